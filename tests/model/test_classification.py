"""Our sequence classifier against transformers': scores, the three losses and all gradients, at tensor 1 and 2."""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import assemble
from torch import Tensor

SHAPE = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.2,
}  # fmt: skip
STYLES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
}
# problem type, number of labels, labels of four sequences; the type is also found where the folder names none
PROBLEMS: dict[str, tuple[str, int, Tensor]] = {
    "one number": ("regression", 1, torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "three numbers": ("regression", 3, torch.arange(12.0).view(4, 3) / 4),
    "one label": ("single_label_classification", 3, torch.tensor([0, 2, 1, 2])),
    "any labels": ("multi_label_classification", 3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0.5]])),
}
FOUND = {"one number", "one label", "any labels"}  # what the labels alone tell


def ids_and_mask(padding: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, SHAPE["vocab_size"], (4, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, width in enumerate((5, 0, 1, 8)):
        padded = slice(0, width) if padding == "left" else slice(12 - width, 12)
        mask[row, padded], ids[row, padded] = 0, 1
    return ids, mask


def their_model(style: str, problem: str, named: bool, folder: Path) -> Any:
    from transformers import OPTConfig, OPTForSequenceClassification

    torch.manual_seed(3)
    kind, number, _ = PROBLEMS[problem]
    config = OPTConfig(**SHAPE, **STYLES[style], num_labels=number, problem_type=kind if named else None)
    model = OPTForSequenceClassification(config).double()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.float().save_pretrained(folder)
    return model.double()


def ours(folder: str, problem: str, padding: str, tensor: int) -> tuple[Any, float, dict[str, Any]]:
    """On the crew: scores, loss and this rank's part of every gradient, in float64."""
    from opt_parallel import OPTForSequenceClassification
    from opt_parallel.parallel.shard import marked
    from opt_parallel.parallel.topology import Topology

    ids, mask = ids_and_mask(padding)
    with Topology.open(tensor) as topology:
        model = OPTForSequenceClassification.from_pretrained(folder, tensor=topology.tensor, dtype=torch.float64)
        output = model(ids, mask, labels=PROBLEMS[problem][2])
        output.loss.backward()
        gradients = {
            name.removeprefix("model."): (shard.shape, shard.range, parameter.grad[shard.real].numpy())
            for name, parameter, shard in marked(model)
        }
    return output.logits.detach().numpy(), output.loss.item(), gradients


# by default a choice with each pair of a style, a problem, a padding and a tensor degree
PAIRS = {
    ("pre-norm", "one number", "left", 1), ("350m", "one number", "right", 2),
    ("pre-norm", "three numbers", "left", 2), ("350m", "three numbers", "right", 1),
    ("pre-norm", "one label", "right", 1), ("350m", "one label", "left", 2),
    ("pre-norm", "any labels", "right", 2), ("350m", "any labels", "left", 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("style", "problem", "padding", "tensor"),
    [
        pytest.param(*case, marks=[pytest.mark.long] * (case not in PAIRS))
        for case in itertools.product(STYLES, PROBLEMS, ("left", "right"), (1, 2))
    ],
)
def test_scores_losses_and_gradients(
    crew: Any, tmp_path: Path, style: str, problem: str, padding: str, tensor: int
) -> None:
    from opt_parallel.huggingface.names import hf_names

    theirs = their_model(style, problem, problem not in FOUND, tmp_path)
    ids, mask = ids_and_mask(padding)
    labels = PROBLEMS[problem][2]
    wanted = theirs(ids, mask, labels=labels.double() if labels.is_floating_point() else labels)
    wanted.loss.backward()
    answers = crew(tensor)(ours, str(tmp_path), problem, padding, tensor)
    for scores, loss, _ in answers:
        # float64 holds 16 digits; the weights were float32 on both sides
        torch.testing.assert_close(torch.from_numpy(scores), wanted.logits, rtol=1e-10, atol=1e-10)
        assert loss == pytest.approx(wanted.loss.item(), rel=1e-10)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    seen = set()
    for name, gradient in assemble([gradients for _, _, gradients in answers]).items():
        names = hf_names(name)
        seen.update(names)
        whole = expected[names[0]] if len(names) == 1 else torch.stack([expected[part] for part in names])
        torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-9 * float(whole.abs().max()) + 1e-14)
    assert seen == expected.keys()


def from_a_language_model(folder: str, tensor: int, output: str) -> tuple[Any, list[str], str]:
    """On the crew: a classifier on a language model's weights, saved; its scores and labels, and what was said."""
    from opt_parallel import OPTForSequenceClassification
    from opt_parallel.parallel.topology import Topology

    ids, mask = ids_and_mask("left")
    with Topology.open(tensor) as topology, contextlib.redirect_stdout(io.StringIO()) as said:
        model = OPTForSequenceClassification.from_pretrained(folder, tensor=topology.tensor, num_labels=5, seed=7)
        model.save_pretrained(output)
        with torch.no_grad():
            scores = model(ids, mask).logits.numpy()
    return scores, list(model.config.id2label.values()), said.getvalue()


def test_a_new_head_is_the_same_at_every_degree_and_loads_in_transformers(crew: Any, tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

    OPTForCausalLM(OPTConfig(**SHAPE)).save_pretrained(tmp_path / "language")
    (first, names, said), *_ = crew(1)(from_a_language_model, str(tmp_path / "language"), 1, str(tmp_path / "one"))
    assert abs(first).min() > 0
    for scores, _, _ in crew(2)(from_a_language_model, str(tmp_path / "language"), 2, str(tmp_path / "two")):
        torch.testing.assert_close(scores, first, rtol=1e-5, atol=1e-6)
    assert "has no classification head: a head for 5 labels is randomly initialised with seed 7" in said
    loaded, info = OPTForSequenceClassification.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(info.values()), info
    ids, mask = ids_and_mask("left")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids, mask).logits, torch.tensor(first), rtol=1e-5, atol=1e-6)
    assert [loaded.config.id2label[number] for number in range(5)] == names == [f"LABEL_{n}" for n in range(5)]


def last_position(folder: str) -> list[Any]:
    """On the crew: scores from embeddings, which have no padding id, and from the ids' last position."""
    from opt_parallel import OPTForSequenceClassification

    ids, mask = ids_and_mask("left")
    model = OPTForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        embeddings = model.model.decoder.embed_tokens(ids)
        return [model(inputs_embeds=embeddings, attention_mask=mask).logits.numpy(), model(ids, mask).logits.numpy()]


def test_embeddings_are_read_at_the_last_position(crew: Any, tmp_path: Path) -> None:
    their_model("pre-norm", "one label", True, tmp_path)
    ((from_embeddings, from_ids),) = crew(1)(last_position, str(tmp_path))
    torch.testing.assert_close(from_embeddings, from_ids, rtol=0, atol=0)


def test_the_checkpoints_own_number_of_labels_keeps_their_names(tmp_path: Path) -> None:
    from opt_parallel import OPTForSequenceClassification

    model = their_model("pre-norm", "one label", True, tmp_path)
    model.config.id2label = {0: "no", 1: "perhaps", 2: "yes"}
    model.config.save_pretrained(tmp_path)
    for number in (None, 3):
        ours = OPTForSequenceClassification.from_pretrained(tmp_path, num_labels=number)
        assert ours.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
