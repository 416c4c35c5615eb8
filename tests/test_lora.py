"""LoRA in any layout is LoRA on one process; what it leaves is read by `peft`, by transformers and by every layout."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import launch, python, small
from hugging_face import some_ids
from layouts import Layout, in_bf16
from lora_runs import go, go_plainly, go_with_peft, random_adapter, run_on, write_base
from tampering import edit

from opt_parallel.checkpoint.inherit import model_at
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.config.run import Run
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.parallel.shard import Constant, Shard
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export, export_adapter
from opt_parallel.tools.verify import verify

LAYOUTS = {
    "t1d1z0": Layout(),
    "t1d2z3": Layout(data=2, stage=3, micro=2),
    "t2d1z1": Layout(tensor=2, stage=1, micro=4, sequence=False),
    "t2d1z2": Layout(tensor=2, stage=2, micro=4, recompute="full"),
    "t2d2z3": Layout(tensor=2, data=2, stage=3, micro=2),
    "t2d2z1-offload": Layout(tensor=2, data=2, stage=1, micro=4, offload=True),
}
HALF, STEPS = 2, 3
LOSS = 1e-5  # relative: float32, sums in another order

Straight = Callable[[str], tuple[list[dict[str, Any]], Run]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[float]]:
    return go_plainly(run_on(base, tmp_path_factory.mktemp("plain"), Layout(), STEPS))


@pytest.fixture(scope="module")
def straight(crew: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """`straight(layout)`: what each rank of a run answered that was saved half-way and at the end, and the run."""
    done: dict[str, tuple[list[dict[str, Any]], Run]] = {}

    def of(name: str) -> tuple[list[dict[str, Any]], Run]:
        if name not in done:
            run = run_on(base, tmp_path_factory.mktemp("straight") / "run", LAYOUTS[name], STEPS)
            done[name] = crew(LAYOUTS[name].world)(go, run, STEPS, (HALF, STEPS)), run
        return done[name]

    return of


def checkpoint_of(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step}"


pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys")  # so mildly does `peft` say it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in ("t2d2z3", "t2d1z2") else ()) for name in LAYOUTS]
)
def test_any_layout_is_one_process(straight: Straight, plain: tuple[list[float], list[float]], name: str) -> None:
    losses, norms = plain
    assert len(set(losses)) == STEPS
    for answer in straight(name)[0]:
        assert answer["losses"] == pytest.approx(losses, rel=LOSS)
        assert answer["norms"] == pytest.approx(norms, rel=1e-4)  # squares of small numbers, summed up
        assert answer["moved"] == []


@pytest.mark.parametrize(
    ("precision", "stage"), [pytest.param("bf16", 1, marks=pytest.mark.long), ("bf16", 3), ("fp16", 2)]
)
def test_reduced_precision_follows(
    crew: Any, base: Path, plain: tuple[list[float], list[float]], tmp_path: Path, precision: str, stage: int
) -> None:
    """As close as test_engine holds full training: losses of order 5."""
    layout = Layout(tensor=2, data=2 if stage == 1 else 1, stage=stage, micro=4, precision=precision)
    answers = crew(layout.world)(go, run_on(base, tmp_path, layout, STEPS), STEPS)
    for answer in answers:
        assert answer["losses"] == answers[0]["losses"]
        assert answer["losses"] == pytest.approx(plain[0], abs={"bf16": 0.03, "fp16": 0.01}[precision])
        assert answer["moved"] == []


@pytest.mark.parametrize(("data", "stage"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.long)])
def test_bf16_state_follows(
    crew: Any, base: Path, plain: tuple[list[float], list[float]], tmp_path: Path, data: int, stage: int
) -> None:
    """Only A and B are rounded stochastically. They are small, and the frozen weights stay as the base has them."""
    layout = Layout(data=data, stage=stage, micro=4, precision="bf16")
    run = run_on(base, tmp_path, layout, STEPS)
    losses = {}
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, clip=0.0))
    for name, each in {"fp32": run, "bf16": in_bf16(run)}.items():
        answers = crew(data)(go, each, HALF)
        assert all(answer["moved"] == [] for answer in answers)
        losses[name] = answers[0]["losses"]
    assert losses["bf16"][0] == losses["fp32"][0]
    assert losses["bf16"][1] != losses["fp32"][1]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.01)
    assert losses["bf16"] == pytest.approx(plain[0][:HALF], abs=0.03)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("t1d2z3", "t1d1z0"),
        ("t1d1z0", "t2d2z1-offload"),
        pytest.param("t2d2z3", "t1d1z0", marks=pytest.mark.long),
        pytest.param("t2d1z1", "t1d2z3", marks=pytest.mark.long),
    ],
)
def test_another_layout_goes_on(
    crew: Any, straight: Straight, base: Path, tmp_path: Path, before: str, after: str
) -> None:
    answers, ran = straight(before)
    shutil.copytree(checkpoint_of(ran, HALF), tmp_path / "checkpoints" / f"step-{HALF}")
    for answer in crew(LAYOUTS[after].world)(go, run_on(base, tmp_path, LAYOUTS[after], STEPS), STEPS):
        assert answer["losses"] == pytest.approx(answers[0]["losses"][HALF:], rel=LOSS)


def test_a_checkpoint_holds_what_is_trained(straight: Straight, base: Path) -> None:
    manifest = json.loads((checkpoint_of(straight("t1d2z3")[1], STEPS) / "manifest.json").read_text())
    names = {name.removeprefix("decoder.layers.") for name in manifest["tensors"]}
    layers = ("self_attn.qkv_proj", "self_attn.out_proj", "fc1", "fc2")
    assert names == {f"{n}.{layer}.lora_{x}" for n in (0, 1) for layer in layers for x in "ab"}
    assert manifest["base"]["checkpoint"] == str(base)


def test_peft_trains_alike(crew: Any, base: Path, tmp_path: Path) -> None:
    """From the same A and B, without dropout: transformers, `peft` and torch's AdamW have the losses of tensor 2."""
    from peft import PeftModel
    from transformers import OPTForCausalLM

    layout = Layout(tensor=2, stage=1, micro=4)
    run = run_on(base, tmp_path, layout, STEPS, ("q_proj", "v_proj", "fc2"), dropout=0.0, layerdrop=0.0)
    ours = crew(2)(go, run, STEPS, (0,))[0]["losses"]
    export_adapter(checkpoint_of(run, 0), tmp_path / "adapter", ExportDtype.float32)
    model = PeftModel.from_pretrained(OPTForCausalLM.from_pretrained(base), tmp_path / "adapter", is_trainable=True)
    model.eval()  # no dropout
    assert go_with_peft(run, model) == pytest.approx(ours, rel=LOSS)


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("pre-norm", None),
        ("350m", ("q_proj", "v_proj")),
        pytest.param("galactica", ("k_proj", "fc1"), marks=pytest.mark.long),
        pytest.param("gelu", ("out_proj",), marks=pytest.mark.long),
    ],
)
def test_peft_and_transformers_read_it(
    crew: Any, tmp_path: Path, variant: str, targets: tuple[str, ...] | None
) -> None:
    from peft import PeftModel
    from transformers import OPTForCausalLM

    theirs = write_base(tmp_path / "base", variant)
    chosen = () if targets is None else (targets,)
    run = run_on(theirs, tmp_path / "run", Layout(tensor=2, stage=1), STEPS, *chosen)
    crew(2)(random_adapter, run, 0)
    saved, ids = checkpoint_of(run, 0), some_ids()
    opened = open_checkpoint(saved)
    with torch.no_grad():
        ours = opened.model(ALONE, torch.device("cpu"))(ids)
        alone = OPTForCausalLM.from_pretrained(theirs)(input_ids=ids).logits
    assert (ours - alone).abs().max() > 0.01  # the adapter does something

    export_adapter(saved, tmp_path / "adapter", ExportDtype.float32)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base = OPTForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)  # fp32, other order

    export(saved, tmp_path / "merged", 10**9, ExportDtype.float32)
    for against in (None, saved):
        verdict = verify(tmp_path / "merged", against)
        assert verdict is not None
        assert verdict.agrees, verdict
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, values in OPTForCausalLM.from_pretrained(tmp_path / "merged").named_parameters():
        torch.testing.assert_close(values, merged[name], rtol=1e-6, atol=1e-6)  # a rounding of fp32

    for name, shape in {"fc1.weight": (96, 48), "self_attn.qkv_proj.weight": (3, 48, 48)}.items():
        tensor = f"decoder.layers.1.{name}"
        whole = opened.weights(tensor, Shard(shape, 0, 0, 1, Constant(0), False))
        for dim in range(len(shape) - 2, len(shape)):
            for parts in (2, 3):
                for part in range(parts):
                    shard = Shard(shape, dim, part, parts, Constant(0), False)
                    assert torch.equal(opened.weights(tensor, shard), whole[shard.range])


def test_a_lora_checkpoint_is_a_base_too(crew: Any, base: Path, tmp_path: Path) -> None:
    """A second adapter on the first: the first is merged into the weights that the second run freezes."""
    first = run_on(base, tmp_path / "first", Layout())
    crew(1)(random_adapter, first, 0)
    second = run_on(base, tmp_path / "second", Layout(), STEPS, ("fc1",))
    second = dataclasses.replace(second, init_from=str(checkpoint_of(first, 0)))
    crew(1)(random_adapter, second, 0)
    whole = Shard((48, 96), 0, 0, 1, Constant(0), False)
    below, above = open_checkpoint(checkpoint_of(first, 0)), open_checkpoint(checkpoint_of(second, 0))
    assert torch.equal(above.weights("decoder.layers.0.fc2.weight", whole), below.weights(
        "decoder.layers.0.fc2.weight", whole))  # fmt: skip
    turned = Shard((96, 48), 0, 0, 1, Constant(0), False)
    assert not torch.equal(above.weights("decoder.layers.0.fc1.weight", turned), below.weights(
        "decoder.layers.0.fc1.weight", turned))  # fmt: skip


@pytest.mark.parametrize("kind", ["OPTForCausalLM", "OPTForSequenceClassification"])
def test_a_classifiers_score_is_trained_with_it(crew: Any, tmp_path: Path, kind: str) -> None:
    """Whether the base has a score already or not."""
    from peft import PeftModel
    from transformers import OPTForSequenceClassification

    theirs = write_base(tmp_path / "base", "pre-norm", kind, num_labels=3)
    run = run_on(theirs, tmp_path / "run", Layout(tensor=2, stage=3))
    run = dataclasses.replace(run, task=TaskConfig(name=Task.classify, lora=run.task.lora))
    crew(2)(random_adapter, run, 3)
    export_adapter(checkpoint_of(run, 0), tmp_path / "adapter", ExportDtype.float32)
    model = OPTForSequenceClassification.from_pretrained(theirs, num_labels=3)
    adapted, ids = PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), some_ids()
    with torch.no_grad():
        ours = open_checkpoint(checkpoint_of(run, 0)).classifier(3, ALONE, torch.device("cpu"))(ids)
        torch.testing.assert_close(adapted(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)  # fp32, other order


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 8}, "was trained with task.lora.rank=4, but this run has 8"),
        ({"alpha": 6.0}, "was trained with task.lora.alpha=12.0, but this run has 6.0"),
        ({"targets": ["fc1"]}, "was trained with task.lora.targets="),
        ({"rank": 0}, "was trained with task.lora.rank=4, but this run has 0"),
    ],
)
def test_other_terms_do_not_go_on(crew: Any, straight: Straight, change: dict[str, Any], said: str) -> None:
    run = straight("t1d1z0")[1]
    lora = dataclasses.replace(run.task.lora, **change)
    with pytest.raises(AssertionError, match=said):
        crew(1)(go, dataclasses.replace(run, task=TaskConfig(lora=lora)), STEPS)


def test_the_order_of_targets_says_nothing(crew: Any, straight: Straight) -> None:
    run = straight("t1d1z0")[1]
    lora = dataclasses.replace(run.task.lora, targets=run.task.lora.targets[::-1])
    assert crew(1)(go, dataclasses.replace(run, task=TaskConfig(lora=lora)), STEPS)[0]["losses"] == []


def test_another_base_is_noticed(crew: Any, straight: Straight, tmp_path: Path) -> None:
    """On resuming it is another `init_from`; on opening the folder has changed, or is gone."""
    ran = straight("t1d1z0")[1]
    other = write_base(tmp_path / "other")
    folder = tmp_path / "run" / "checkpoints" / f"step-{STEPS}"
    shutil.copytree(checkpoint_of(ran, STEPS), folder)
    run = run_on(other, tmp_path / "run", Layout(), STEPS)
    assert crew(1)(go, run, STEPS)[0]["moved"] == []  # a copy is the same base

    edit(folder, lambda manifest: manifest["base"].update(checkpoint=str(other)))
    open_checkpoint(folder)
    shutil.rmtree(other)
    with pytest.raises(UserError, match=r"belongs to a LoRA run and needs its base: .* does not exist"):
        open_checkpoint(folder)
    write_base(other, init_std=0.3)
    with pytest.raises(UserError, match=r"its base .* has changed"):
        open_checkpoint(folder)
    with pytest.raises(AssertionError, match=r"has other weights \(checksum"):
        crew(1)(go, run, STEPS)


def test_mistakes_are_one_line(straight: Straight, base: Path, tmp_path: Path) -> None:
    export_adapter(checkpoint_of(straight("t1d1z0")[1], STEPS), tmp_path / "adapter", ExportDtype.float32)
    with pytest.raises(UserError, match="is a PEFT adapter, not a network"):
        model_at(tmp_path / "adapter", "init_from=")
    with pytest.raises(UserError, match="is not a training checkpoint"):
        export_adapter(base, tmp_path / "another", ExportDtype.float32)


@pytest.mark.long
def test_train_py_adapts_exports_and_goes_on(tmp_path: Path) -> None:
    """Two processes at tensor 2 under ZeRO-3, then one; the base is read at both starts, and its name is told."""
    folder = write_base(tmp_path / "base", vocab_size=300)
    texts = [f"Sentence {i} of the made-up text" for i in range(50)]
    save_tokenizer(train_tokenizer(texts, 300), folder)
    arguments = [each for each in small(tmp_path) if not each.startswith("model=")]
    run = ["train.py", *arguments, f"init_from={folder}", "task.lora.rank=4", "steps=2"]
    process = launch(2, *run, "parallel.tensor=2", "zero.stage=3", "zero.persistence_threshold=0", "stop_at=1")
    assert process.returncode == 0, process.stderr
    assert "0.1M parameters and 1,536 that LoRA trains (rank 4 on q_proj, v_proj)" in process.stdout
    process = python(*run, "export.at_end=true")
    assert process.returncode == 0, process.stderr
    assert "continuing at step 1" in process.stdout
    assert "is not read" not in process.stdout
    saved = tmp_path / "run" / "checkpoints" / "step-2"
    verdict = verify(tmp_path / "run" / "export", saved)
    assert verdict is not None
    assert verdict.agrees, verdict
    adapter = ["scripts/export.py", "--adapter", "--checkpoint", str(saved), "--output", str(tmp_path / "adapter")]
    assert python(*adapter).returncode == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
