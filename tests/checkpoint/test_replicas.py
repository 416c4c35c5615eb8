"""A bit that flips in a value that several ranks hold is seen at the next save, and nothing is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import Layout, micro_batches
from lora_runs import run_on, write_base
from resumed_runs import run_of, with_tokenizer

from opt_parallel.config.run import Run

NORM, FC1 = "decoder.layers.1.final_layer_norm.weight", "decoder.layers.1.fc1.weight"


def train_and_save(run: Run, flip: tuple[int, str] | None, bit: int = 1) -> str:
    """On the crew: a step, saved; another; a bit of what is called so flipped on a rank, its lowest by default; saved
    again. What the second save ends with."""
    import torch

    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.clock import Clock
    from opt_parallel.runtime.errors import UserError
    from opt_parallel.start import build_engine

    with Topology.open(run.parallel.tensor) as topology:
        start = open_checkpoint(run.init_from) if run.init_from else None
        base = start.as_base(str(run.init_from)) if start else None
        store = Store(run, topology, run.folder / "tokenizer", base=base)
        engine, clock = build_engine(run, topology, store, None, start), Clock()
        try:
            for _ in range(2):
                batches = micro_batches(run, clock.step, topology.data.rank, topology.data.size)
                clock = clock.after(run.global_batch, engine.step(batches, clock).tokens)
                if clock.step == 2 and flip is not None and topology.world.rank == flip[0]:
                    values = next(each.values for each in engine.replicas() if each.name == flip[1])
                    assert values.is_contiguous()
                    integer = {2: torch.int16, 4: torch.int32}[values.element_size()]
                    values.view(-1).view(integer)[7].bitwise_xor_(bit)
                store.save(engine, clock)
        except UserError as error:
            return str(error)
        finally:
            store.finish()
            engine.close()
    return "saved"


def saves_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


CASES = {  # where a bit flips, and the ranks of which the line must name the first
    "a weight at stage 0": (Layout(data=4), (2, FC1), [2]),
    "a moment at stage 0": (Layout(data=2, micro=2), (1, f"exp_avg_sq of {FC1}"), [0, 1]),
    "a whole weight at stage 0, in a grid": (Layout(tensor=2, data=2, micro=2), (3, NORM), [3]),
    "a split weight at stage 0, in a grid": (Layout(tensor=2, data=2, micro=2), (3, FC1), [1, 3]),
    "between tensor ranks": (Layout(tensor=4, stage=1, micro=4), (1, f"weights of {NORM}"), [1]),
    "a moment between tensor ranks": (Layout(tensor=2, stage=1, micro=4), (1, f"exp_avg of {NORM}"), [0, 1]),
    "what bf16 computes with": (Layout(data=2, stage=1, micro=2, precision="bf16"), (1, FC1), [0, 1]),
    "what bf16 computes with, stage 2": (Layout(data=2, stage=2, micro=2, precision="bf16"), (1, FC1), [0, 1]),
    "stage 3": (Layout(tensor=2, stage=3, micro=4), (1, f"weights of {NORM}"), [0, 1]),
    "stage 3, in a grid": (Layout(tensor=2, data=2, stage=3, micro=2), (3, f"weights of {NORM}"), [2, 3]),
    "what bf16 computes with, stage 3": (Layout(tensor=2, stage=3, micro=4, precision="bf16"), (1, NORM), [0, 1]),
    "offloaded": (Layout(tensor=2, stage=2, offload=True), (1, f"weights of {NORM}"), [0, 1]),
}


LONG = {
    "a whole weight at stage 0, in a grid", "what bf16 computes with", "between tensor ranks", "offloaded",
    "stage 3, in a grid", "what bf16 computes with, stage 3",
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in CASES])
def test_a_flipped_bit_is_named_and_not_saved(crew: Any, tmp_path: Path, case: str) -> None:
    layout, flip, ranks = CASES[case]
    folder = with_tokenizer(tmp_path / "run")
    answers = crew(layout.world)(train_and_save, run_of(folder, layout, 4, layout.precision), flip)
    assert len(set(answers)) == 1
    line = answers[0]
    assert "step-2 is not saved" in line
    assert flip[1] in line
    assert all(f"rank {rank}" in line for rank in ranks), line
    assert sum(f"rank {rank}" in line for rank in range(layout.world)) == len(ranks), line
    assert f"{folder}/checkpoints/step-1" in line  # the way out
    assert saves_in(folder) == ["step-1"]


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (Layout(data=2, stage=1, micro=4), [0, 1]),
        pytest.param(Layout(tensor=2, data=2, stage=1, micro=2), [3], marks=pytest.mark.long),
        pytest.param(Layout(tensor=2, data=2, stage=3, micro=2), [2, 3], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_frozen_weight_that_lora_leaves_alone(crew: Any, tmp_path: Path, layout: Layout, ranks: list[int]) -> None:
    """It is in no checkpoint, but every gradient goes through it."""
    run = run_on(write_base(tmp_path / "base"), with_tokenizer(tmp_path / "run"), layout, 4)
    answers = crew(layout.world)(train_and_save, run, (layout.world - 1, NORM))
    assert len(set(answers)) == 1
    assert NORM in answers[0]
    assert [rank for rank in range(layout.world) if f"rank {rank}" in answers[0]] == ranks, answers[0]
    assert saves_in(tmp_path / "run") == ["step-1"]


def test_the_sign_and_the_largest_bit(crew: Any, tmp_path: Path) -> None:
    for bit in (30, 31):
        folder = with_tokenizer(tmp_path / str(bit))
        mask = (1 << bit) - (1 << 32) * (bit == 31)
        answers = crew(2)(train_and_save, run_of(folder, Layout(data=2), 4), (0, FC1), mask)
        assert all(FC1 in answer for answer in answers)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_false_alarm(crew: Any, tmp_path: Path, precision: str) -> None:
    for stage in range(precision != "fp32", 4):
        layout = Layout(tensor=2, data=2, stage=stage)
        folder = with_tokenizer(tmp_path / f"{precision}-{stage}")
        assert crew(4)(train_and_save, run_of(folder, layout, 4, precision), None) == ["saved"] * 4
        assert saves_in(folder) == ["step-1", "step-2"]


def spread_of(added: float) -> tuple[float, bool]:
    """On the crew: the spread of values to which the second rank adds something; whether they were left alone."""
    import torch

    from opt_parallel.checkpoint.replicas import _spread
    from opt_parallel.parallel.topology import Topology

    with Topology.open(2) as topology:
        values = torch.tensor([1.0, -2.0, 0.5])
        values[2] += added * topology.tensor.rank
        before = values.clone()
        spread = _spread(values, topology.tensor)
    return spread, bool((values.nan_to_num() == before.nan_to_num()).all())


def test_rounding_is_told_from_damage_where_sums_may_come_in_another_order(crew: Any) -> None:
    """Between the tensor ranks of GPUs, of which there are none here."""
    from opt_parallel.checkpoint.replicas import ROUNDING

    assert crew(2)(spread_of, 0.0) == [(0.0, True)] * 2
    for added, is_rounding in ((1e-6, True), (0.5, False), (float("inf"), False), (float("nan"), False)):
        for spread, untouched in crew(2)(spread_of, added):
            assert untouched
            assert (spread <= ROUNDING) == is_rounding
