"""The learning rate over a run whose batch changes when it goes on: continuous, in tokens or in steps as it was given.

`PYTHONPATH=.:tests/support python tests/test_schedule.py` prints the whole table.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command import small, train_rows
from layouts import Layout, rate_at, run_for
from training import trained

from opt_parallel.config.run import Run, ScheduleConfig, ScheduleName
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.log import aligned

STEPS, CHANGED, WARMUP = 24, 5, 8  # of the run; after so many the change; of the warm-up, before the change
TOKENS = WARMUP * 64  # of the warm-up: 4 rows of 16 a step
BEFORE = {"global": 4, "micro": 1, "length": 16}
CHANGES = {  # the data degree is no setting of a run, and changes none of its tokens
    "batch up": {"global": 12},
    "batch down": {"global": 2},
    "row length": {"length": 40},
    "accumulation": {"micro": 4},
    "data degree": {},
}
SAME = ("accumulation", "data degree")  # changes that leave a step its tokens
UNITS = {"tokens": {"warmup_tokens": TOKENS}, "steps": {"warmup_steps": WARMUP}}
Series = list[tuple[Clock, float]]


def run_of(name: str, unit: str, shape: dict[str, int]) -> Run:
    run = run_for(Layout(), lr=1.0)
    return dataclasses.replace(
        run,
        steps=STEPS,
        batch={"global": shape["global"], "micro": shape["micro"]},
        data=dataclasses.replace(run.data, sequence_length=shape["length"]),
        schedule=ScheduleConfig(name=ScheduleName(name), final_ratio=0.1, **UNITS[unit]),
    )


def rates(name: str, unit: str, change: dict[str, int], changed: int = CHANGED) -> Series:
    """The clock after each step, and the step's learning rate; the change comes after step `changed`."""
    clock, found = Clock(), []
    before, after = run_of(name, unit, BEFORE), run_of(name, unit, BEFORE | change)
    for step in range(STEPS):
        run = after if step >= changed else before
        clock = clock.after(run.global_batch, run.batch_tokens)
        found.append((clock, rate_at(run, clock)))
    return found


def decayed(name: str, progress: float) -> float:
    """The rate after `progress` of the decay, from the formulas' names."""
    falls = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
    return 0.1 + 0.9 * falls[name]


@pytest.mark.parametrize("changed", [CHANGED, 14])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_warmup_in_tokens_counts_the_clocks(change: str, name: str, changed: int) -> None:
    """It is the share of its tokens that were seen; the decay then takes the steps that are left, at the average
    tokens of a step so far."""
    for clock, rate in rates(name, "tokens", CHANGES[change], changed):
        if clock.tokens <= TOKENS:
            assert rate == pytest.approx(clock.tokens / TOKENS, rel=1e-12)
        else:
            warmup = TOKENS / (clock.tokens / clock.step)
            assert rate == pytest.approx(decayed(name, (clock.step - warmup) / (STEPS - warmup)), rel=1e-12)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_makes_it_jump(change: str, name: str, unit: str) -> None:
    """Up to the peak it never falls, from there on never rises, and no step moves it further than a step of the
    warm-up or decay with the larger batch would."""
    for changed in range(STEPS):
        found = [rate for _, rate in rates(name, unit, CHANGES[change], changed)]
        peak = found.index(max(found))
        assert all(a <= b for a, b in pairwise(found[: peak + 1]))
        assert all(a >= b for a, b in pairwise(found[peak:]))
        largest = max(3 / WARMUP, 1.6 / (STEPS - WARMUP))
        assert all(abs(b - a) <= largest + 1e-12 for a, b in pairwise(found))
        assert found[-1] == pytest.approx(1.0 if name == "constant" else 0.1)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_leaves_a_step_its_unit_leaves_the_rate_to_the_last_bit(change: str, name: str, unit: str) -> None:
    if change in SAME or unit == "steps":
        straight = [rate for _, rate in rates(name, "steps", {})]
        assert [rate for _, rate in rates(name, unit, CHANGES[change])] == straight


def test_a_batch_that_never_changes_rounds_the_warmup_up_to_whole_steps() -> None:
    run = dataclasses.replace(run_for(Layout(), lr=1.0), schedule=ScheduleConfig(warmup_tokens=7 * 128 + 1), steps=99)
    found = [rate_at(run, Clock(step, 8 * step, 128 * step)) for step in range(1, 10)]
    assert found[:8] == [step / 8 for step in range(1, 9)]
    assert found[8] < 1


def test_padding_is_no_token() -> None:
    """Rows that are half full take twice the steps."""
    run = dataclasses.replace(run_for(Layout(), lr=1.0), schedule=ScheduleConfig(warmup_tokens=512), steps=99)
    assert [rate_at(run, Clock(step, 8 * step, 64 * step)) for step in (1, 4, 8)] == [1 / 8, 4 / 8, 1.0]


def test_train_py_goes_on_with_everything_changed(crew: Any, tmp_path: Path) -> None:
    """With larger batches and longer rows: the rate is that of the clock's tokens."""
    arguments = [
        *small(tmp_path), "steps=8", "schedule.warmup_steps=null", "schedule.warmup_tokens=512",
        "schedule.name=constant", "optimizer.lr=1e-3",
    ]  # fmt: skip
    assert trained(crew(1), *arguments, "stop_at=4").returncode == 0
    again = trained(crew(1), *arguments, "batch.global=8", "batch.micro=4", "data.sequence_length=24")
    assert again.returncode == 0, again.stderr
    rows = train_rows(tmp_path / "run")
    assert [row["tokens"] for row in rows[2:6]] == [3 * 64, 256, 256 + 192, 256 + 2 * 192]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * min(1, row["tokens"] / 512) for row in rows], rel=1e-9)


def test_train_py_refuses_a_warmup_that_would_not_end(crew: Any, tmp_path: Path) -> None:
    arguments = [*small(tmp_path), "schedule.warmup_steps=null", "schedule.warmup_tokens=321"]
    refused = trained(crew(1), *arguments)
    assert refused.returncode == 2
    assert "schedule.warmup_tokens=321 " in refused.stderr
    assert not (tmp_path / "cache").exists()  # nothing was prepared for it


def table() -> str:
    columns = [(name, unit) for unit in UNITS for name in ("linear", "cosine", "constant")]
    parts = []
    for change, what in CHANGES.items():
        for changed in (CHANGED, 14):
            found: list[Any] = [rates(name, unit, what, changed) for name, unit in columns]
            rows = [["step", "tokens", *(f"{name}, {unit}" for name, unit in columns)]]
            for step in range(STEPS):
                numbers = [f"{series[step][1]:.4f}" for series in found]
                rows.append([f"{step + 1}{'*' * (step == changed)}", f"{found[0][step][0].tokens}", *numbers])
            said = ", ".join(f"{BEFORE[key]} → {value} ({key})" for key, value in what.items())
            parts.append(f"{change}: {said or 'no change of the run'}, from step {changed + 1}*\n{aligned(rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(f"warm-up of {TOKENS} tokens, or {WARMUP} steps, of {STEPS}; peak 1, final_ratio 0.1\n\n{table()}")
