"""The classes are ordinary torch modules: state dicts, copies, dtypes, optimizers, accelerate, Trainer."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import opt_parallel
from opt_parallel import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, OPTModel

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "init_std": 0.1, "dropout": 0.0,
}  # fmt: skip
CLASSES = ("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification")


def some_ids(seed: int = 5) -> Tensor:
    return torch.randint(4, 131, (3, 10), generator=torch.Generator().manual_seed(seed))


def pair(name: str = "OPTForCausalLM", **changes: Any) -> tuple[Any, Any]:
    """Our model and transformers', with the same weights."""
    import transformers

    theirs = getattr(transformers, name)(transformers.OPTConfig(**{**SHAPE, **changes}))
    ours = getattr(opt_parallel, name)(OPTConfig(**{**SHAPE, **changes}))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", CLASSES)
def test_state_dicts_are_exchanged(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    for theirs_first, our_first in zip(theirs.eval()(some_ids()), ours.eval()(some_ids()), strict=True):
        assert theirs_first == our_first
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = type(ours)(OPTConfig(**SHAPE), seed=7).eval()
    before = other(some_ids())[0]
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert not torch.equal(before, other(some_ids())[0])
    assert torch.equal(other(some_ids())[0], ours(some_ids())[0])
    assert other.num_parameters() == ours.num_parameters()  # the marks are there again
    with pytest.raises(RuntimeError, match=r"Missing key.*\n.*Unexpected key.*k_proj"):
        ours.load_state_dict({key: each for key, each in theirs.state_dict().items() if "1.self_attn.q_" not in key})
    within = torch.nn.Sequential(ours)
    within.load_state_dict(within.state_dict())
    assert {key.removeprefix("0.") for key in within.state_dict()} == theirs.state_dict().keys()


def test_counts_and_kinds() -> None:
    for name in CLASSES:
        ours, theirs = pair(name)
        for only, without in ((False, False), (True, False), (False, True)):
            arguments = {"only_trainable": only, "exclude_embeddings": without}
            assert ours.num_parameters(**arguments) == theirs.num_parameters(**arguments)
        assert (ours.dtype, ours.device, ours.training) == (theirs.dtype, theirs.device, theirs.training)
        assert ours.base_model_prefix == theirs.base_model_prefix
    ours, theirs = pair()
    for each in (ours, theirs):
        each.get_input_embeddings().weight.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    assert OPTModel(OPTConfig(**SHAPE), device="meta").device.type == "meta"
    with torch.device("meta"):
        assert OPTModel(OPTConfig(**SHAPE)).device.type == "meta"
    assert OPTModel(OPTConfig(**SHAPE), dtype=torch.bfloat16).dtype is torch.bfloat16


def test_copies(tmp_path: Path) -> None:
    ours, _ = pair()
    copied = copy.deepcopy(ours.eval())
    assert torch.equal(copied(some_ids()).logits, ours(some_ids()).logits)
    assert copied.lm_head.weight is copied.get_input_embeddings().weight is not ours.lm_head.weight
    copied.save_pretrained(tmp_path / "copied")  # which needs the parameters' marks
    again = OPTForCausalLM.from_pretrained(tmp_path / "copied")
    assert torch.equal(again(some_ids()).logits, ours(some_ids()).logits)
    with torch.no_grad():
        output = ours(some_ids(), labels=some_ids())
    assert copy.deepcopy(output.past_key_values)[0][0].shape == (3, 4, 10, 12)
    assert {**output}.keys() == {"loss", "logits", "past_key_values"}
    assert type(output)({**output})["logits"] is output.logits
    assert "loss" in output
    assert output.get("attentions") is None


def test_half_precision() -> None:
    ours, theirs = pair()
    for name in ("bfloat16", "half", "double"):
        getattr(ours, name)()
        getattr(theirs, name)()
        assert ours.dtype is theirs.dtype
        assert ours(some_ids()).logits.dtype is ours.dtype
        assert ours.lm_head.weight is ours.get_input_embeddings().weight
        assert ours.num_parameters() == theirs.num_parameters()
    torch.testing.assert_close(ours(some_ids()).logits, theirs(some_ids()).logits)


def test_an_optimizer_step() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            model(some_ids(step), labels=some_ids(step)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for key, values in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], values, rtol=1e-4, atol=1e-5)


def test_recomputation_changes_nothing() -> None:
    ours, theirs = pair(dropout=0.1)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert ours.is_gradient_checkpointing
    assert ours(some_ids()).past_key_values is None is theirs.eval()(some_ids(), use_cache=False).past_key_values
    with pytest.raises(ValueError, match="use_cache=True does not work with gradient checkpointing"):
        ours(some_ids(), use_cache=True)
    losses = []
    for enable in (True, False):
        (ours.activation_checkpointing_enable if enable else ours.gradient_checkpointing_disable)()
        ours.zero_grad()
        ours.model.samples = ours.model.forwards = 0
        loss = ours(some_ids(), labels=some_ids()).loss
        loss.backward()
        losses.append((loss.item(), ours.lm_head.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
    with pytest.raises(ValueError, match="use_reentrant=False; leave these out"):
        ours.gradient_checkpointing_enable({"use_reentrant": True})


def test_accelerate() -> None:
    from accelerate import Accelerator

    ours, theirs = pair()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    answers = []
    for model in (ours, theirs):
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss = prepared(some_ids(), labels=some_ids()).loss
        accelerator.backward(loss)
        optimizer.step()
        answers.append(loss.item())
        assert accelerator.unwrap_model(prepared) is model
    assert answers[0] == pytest.approx(answers[1], rel=1e-2)  # bf16 has 8 bits


@pytest.mark.parametrize("steps", [4, pytest.param(10, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [CLASSES[1], *(pytest.param(name, marks=pytest.mark.long) for name in CLASSES[2:])])
def test_steps_of_their_trainer(tmp_path: Path, name: str, steps: int) -> None:
    from transformers import Trainer, TrainingArguments

    def example(number: int) -> dict[str, Any]:
        ids = some_ids(number)[0]
        return {"input_ids": ids, "labels": ids if name == CLASSES[1] else torch.tensor(number % 2)}

    examples, answers = [example(number) for number in range(20)], []
    for number, model in enumerate(pair(name)):
        folder = str(tmp_path / str(number))
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
            eval_strategy="steps", eval_steps=steps, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples[:4])
        trainer.train()  # which saves a checkpoint at its end
        rows = trainer.state.log_history
        answers.append([row[key] for row in rows for key in ("loss", "eval_loss") if key in row])
        trainer.train(resume_from_checkpoint=True)
    assert len(answers[0]) == steps + 1
    assert answers[0] == pytest.approx(answers[1], rel=1e-3)


def test_no_gradient_is_lost_in_a_classifier() -> None:
    ours, theirs = pair("OPTForSequenceClassification", num_labels=3)
    for model in (ours, theirs):
        model(some_ids(), labels=torch.tensor([0, 2, 1])).loss.backward()
    torch.testing.assert_close(ours.score.weight.grad, theirs.score.weight.grad)
    assert ours.config.problem_type == theirs.config.problem_type == "single_label_classification"
    assert isinstance(ours, OPTForSequenceClassification)
