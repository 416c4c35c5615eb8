"""A run saved in one layout goes on in any other, exactly where the straight run does."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Layout, assemble
from resumed_runs import go, run_of, with_tokenizer
from safetensors.numpy import load_file

from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.config.run import RunConfig
from opt_parallel.parallel.shard import Constant, Shard

LAYOUTS = {
    "t1d1z0": Layout(micro=2),
    "t1d2z1": Layout(data=2, stage=1),
    "t2d1z2": Layout(tensor=2, stage=2, micro=2),
    "t2d2z3": Layout(tensor=2, data=2, stage=3, micro=2),
    "t1d4z3": Layout(data=4, stage=3),
    "t4d1z1": Layout(tensor=4, stage=1, micro=2, sequence=False),
    "t2d2z1-offload": Layout(tensor=2, data=2, stage=1, micro=2, offload=True),
    "t1d2z1-offload": Layout(data=2, stage=1, micro=2, offload=True),
    "t1d2z2m2": Layout(data=2, stage=2, micro=2),
    "t1d2z3": Layout(data=2, stage=3, micro=2),
}
FEW = ["t1d1z0", "t2d2z3", "t2d1z2", "t1d2z1", "t1d2z1-offload"]  # those of the default tests, each resumed as the next
MIXED = [name for name, layout in LAYOUTS.items() if layout.stage > 0]  # those that keep fp32 masters
# Losses of order 6 in another order of bf16's or fp16's sums: as test_engine holds them to fp32's, over eight steps.
FOLLOWS = {"fp32": 0.0, "bf16": 0.02, "fp16": 0.01}

# A CPU may emulate these precisions, and takes ten times as long.
EMULATED = {"num_hidden_layers": 1, "vocab_size": 131}

Straight = Callable[..., tuple[list[dict[str, Any]], Path]]


def agreed(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks answered alike."""
    for key in ("losses", "skipped", "updates", "scale"):
        assert all(answer[key] == answers[0][key] for answer in answers), key
    return answers[0]


@pytest.fixture(scope="module")
def half(request: pytest.FixtureRequest) -> int:
    """The step after which runs are saved."""
    return 10 if request.config.getoption("all_pairs") else 1


@pytest.fixture(scope="module")
def end(request: pytest.FixtureRequest) -> int:
    """The last step: at least the second after a resume, whose loss depends on the restored moments."""
    return 20 if request.config.getoption("all_pairs") else 3


@pytest.fixture(scope="module")
def straight(crew: Any, tmp_path_factory: pytest.TempPathFactory, half: int, end: int) -> Straight:
    """`straight(layout, precision, model)`: what each rank of a run answered, which was saved half-way and not
    interrupted; and its folder. Each is run once."""
    done: dict[str, tuple[list[dict[str, Any]], Path]] = {}

    def of(name: str, precision: str = "fp32", model: dict[str, Any] | None = None) -> Any:
        key = f"{name}-{precision}-{model}"
        if key not in done:
            folder = with_tokenizer(tmp_path_factory.mktemp("straight") / "run")
            run = run_of(folder, LAYOUTS[name], end, precision, model)
            done[key] = crew(LAYOUTS[name].world)(go, run, 0, run.steps, (half,)), folder
        return done[key]

    return of


@pytest.fixture
def resumed(crew: Any, half: int, end: int) -> Callable[..., dict[str, Any]]:
    """`resumed(folder, layout, precision, model)`: what all ranks of the second half answered."""

    def of(folder: Path, name: str, precision: str = "fp32", model: dict[str, Any] | None = None) -> dict[str, Any]:
        run = run_of(folder, LAYOUTS[name], end, precision, model)
        return agreed(crew(LAYOUTS[name].world)(go, run, half, run.steps))

    return of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On demand all layouts, their ordered pairs and all that keep masters, else a choice."""
    everything = metafunc.config.getoption("all_pairs")
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", LAYOUTS if everything else FEW)
    if "same" in metafunc.fixturenames:
        metafunc.parametrize("same", LAYOUTS if everything else ["t1d1z0", "t2d1z2"])
    if "mixed" in metafunc.fixturenames:
        few = [("t1d2z1", "bf16", "t1d2z3"), ("t1d2z3", "fp16", "t2d1z2")]
        every = [
            (name, precision, MIXED[(place + 3) % len(MIXED)])
            for precision in ("bf16", "fp16")
            for place, name in enumerate(MIXED)
        ]
        metafunc.parametrize(("mixed", "precision", "other"), every if everything else few)
    if "pair" in metafunc.fixturenames:
        few = list(zip(FEW, FEW[1:] + FEW[:1], strict=True))
        metafunc.parametrize("pair", itertools.product(LAYOUTS, LAYOUTS) if everything else few, ids="-to-".join)


def test_any_layout_continues_any_other(
    straight: Straight, resumed: Any, half: int, end: int, pair: tuple[str, str]
) -> None:
    before, after = pair
    answers, folder = straight(before)
    wanted = agreed(answers)["losses"]
    got = resumed(folder, after)
    assert got["losses"] == pytest.approx(wanted[half:], rel=1e-5)  # float32, sums in another order
    assert got["updates"] == end


def test_the_same_layout_goes_on_to_the_last_bit(straight: Straight, resumed: Any, half: int, same: str) -> None:
    """Attention dropout included, whose generator is seeded anew for each step."""
    model = {"attention_dropout": 0.1}
    answers, folder = straight(same, model=model)
    assert resumed(folder, same, model=model)["losses"] == agreed(answers)["losses"][half:]


def test_reduced_precision_goes_on(
    straight: Straight, resumed: Any, half: int, mixed: str, precision: str, other: str
) -> None:
    """In the same layout to the last bit, loss scale included; in another one as close as that layout is at all."""
    answers, folder = straight(mixed, precision, EMULATED)
    wanted = agreed(answers)
    for name, tolerance in ((mixed, 0.0), (other, FOLLOWS[precision])):
        got = resumed(folder, name, precision, EMULATED)
        assert got["losses"] == pytest.approx(wanted["losses"][half:], abs=tolerance, rel=0.0)
        assert (got["updates"], got["scale"]) == (wanted["updates"], wanted["scale"])
    if precision == "fp16":
        assert wanted["scale"]["scale"] > 16.0  # it has grown, or nothing would be carried


@pytest.mark.parametrize(
    ("before", "then", "after", "now"),
    [
        ("t2d1z2", "fp32", "t1d2z3", "bf16"),
        pytest.param("t2d2z3", "bf16", "t4d1z1", "fp32", marks=pytest.mark.long),
        ("t1d2z3", "fp16", "t1d1z0", "fp32"),
    ],
)
def test_another_precision_and_layout_go_on(
    straight: Straight, resumed: Any, half: int, before: str, then: str, after: str, now: str
) -> None:
    """Masters are fp32 in each: what differs is what half of the run was rounded to."""
    answers, folder = straight(before, then, EMULATED)
    wanted = agreed(answers)["losses"][half:]
    got = resumed(folder, after, now, EMULATED)["losses"]
    assert got != wanted
    assert got == pytest.approx(wanted, abs=FOLLOWS[then] + FOLLOWS[now])


@pytest.mark.parametrize("layout", ["t1d2z1", pytest.param("t2d2z3", marks=pytest.mark.long)])
def test_steps_that_fp16_skipped_are_no_updates(crew: Any, tmp_path: Path, layout: str) -> None:
    """Adam's bias correction goes by updates; saved before the first of them there are no moments either."""
    folder, crew = with_tokenizer(tmp_path / "run"), crew(LAYOUTS[layout].world)
    run = run_of(folder, LAYOUTS[layout], 7, "fp16", EMULATED, scale=2.0**14)
    wanted = agreed(crew(go, run, 0, 7, (1, 5)))
    assert wanted["updates"] == 7 - sum(wanted["skipped"])
    for step in (1, 5):
        skipped = sum(wanted["skipped"][:step])
        saved = folder / "checkpoints" / f"step-{step}"
        assert json.loads((saved / "manifest.json").read_text())["updates"] == step - skipped
        assert (
            skipped == 1 if step == 1 else 1 < skipped < 4
        )  # at least two updates: one looks like a count that starts anew
        elsewhere = RunConfig("test", str(with_tokenizer(tmp_path / f"from-{step}")))
        got = agreed(crew(go, dataclasses.replace(run, run=elsewhere, resume=str(saved)), step, 7))
        assert (got["losses"], got["scale"]) == (wanted["losses"][step:], wanted["scale"])
        assert got["updates"] == wanted["updates"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("t2d1z2", "t1d1z0"),
        ("t1d1z0", "t1d2z3"),
        pytest.param("t1d4z3", "t4d1z1", marks=pytest.mark.long),
        pytest.param("t1d1z0", "t2d2z3", marks=pytest.mark.long),
    ],
)
def test_saved_before_the_first_step(
    crew: Any, straight: Straight, end: int, tmp_path: Path, before: str, after: str
) -> None:
    """There are no moments yet, and none are made up."""
    folder = with_tokenizer(tmp_path / "run")
    crew(LAYOUTS[before].world)(go, run_of(folder, LAYOUTS[before], end), 0, 0, (0,))
    step = folder / "checkpoints" / "step-0"
    assert json.loads((step / "manifest.json").read_text())["updates"] == 0
    for path in step.glob("rank-*.safetensors"):
        assert all(key.startswith("weights/") for key in load_file(path))
    got = agreed(crew(LAYOUTS[after].world)(go, run_of(folder, LAYOUTS[after], end), 0, 3))
    assert got["losses"] == pytest.approx(agreed(straight(before)[0])["losses"][:3], rel=1e-5)
    assert got["updates"] == 3


def test_a_checkpoint_gives_the_live_weights(straight: Straight, half: int, name: str) -> None:
    """Every logical tensor, whole and as any tensor degree reads it, without a process group."""
    answers, folder = straight(name)
    live = assemble([answer["weights"] for answer in answers])
    reader = CheckpointReader(folder / "checkpoints" / f"step-{half}")
    assert reader.shapes == {name: tuple(values.shape) for name, values in live.items()}
    for tensor, values in live.items():
        dim = reader.manifest["tensors"][tensor]["dim"]
        for parts in (1, 2, 4):
            for part in range(parts):
                shard = Shard(reader.shapes[tensor], dim, part, parts, Constant(0), False)
                assert torch.equal(reader(tensor, shard), values[shard.range]), f"{tensor}, part {part} of {parts}"
