"""The configurations for debugging: debug=overfit, debug=one-batch, debug=profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import small, train_rows
from composing import run_of
from training import trained

from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.rows import rows_of


def test_overfit_trains_on_eight_samples_until_the_loss_is_near_zero(crew: Any, tmp_path: Path) -> None:
    faster = ["debug=overfit", "batch.global=8", "batch.micro=8", "steps=100", "optimizer.lr=1e-2"]
    process = trained(crew(1), *small(tmp_path), *faster)
    assert process.returncode == 0, process.stderr
    rows = train_rows(tmp_path / "run")
    assert rows[0]["loss"] > 5
    assert rows[-1]["loss"] < 0.2
    assert [row["epochs"]["train"] for row in rows] == list(range(1, 101))  # of eight samples


def test_one_batch_does_one_step_of_everything(crew: Any, tmp_path: Path) -> None:
    arguments = [*small(tmp_path), "debug=one-batch", "steps=1", "data.held_out=0.2"]
    process = trained(crew(1), *arguments)
    assert process.returncode == 0, process.stderr
    run = tmp_path / "run"
    assert [row["kind"] for row in rows_of(run / "metrics.jsonl")] == ["train", "validation"]
    assert (run / "checkpoints" / "step-1" / "manifest.json").exists()
    assert (run / "export" / "model.safetensors").exists()
    again = trained(crew(1), *arguments)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "remove the folder" in again.stderr


def test_profile_writes_a_trace_of_three_steps(crew: Any, tmp_path: Path) -> None:
    process = trained(crew(1), *small(tmp_path), "debug=profile")
    assert process.returncode == 0, process.stderr
    trace = json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {name for name in names if name.startswith("ProfilerStep")} == {f"ProfilerStep#{n}" for n in (2, 3, 4)}
    assert "aten::mm" in names
    assert f"{tmp_path}/run/profile" in process.stdout


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("data.samples=0", "data.samples=0 must be at least 1"),
        ("logging.profile=-1", "logging.profile=-1 must not be negative"),
        ("data.samples=3 data.stream=true", r"data\.samples=3 needs prepared text"),
    ],
)
def test_a_wrong_value_is_refused(argument: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        run_of("model=opt-tiny", *argument.split())
