"""The planned memory of a run: its line, the refusal of what cannot fit, and the advice when memory runs out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from command import ROOT, launch, python, small

TRAIN = str(ROOT / "train.py")


def test_a_run_prints_its_planned_memory(tmp_path: Path) -> None:
    process = python(TRAIN, *small(tmp_path), "steps=1")
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("planned memory: ")]
    assert "for weights and states" in line


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(tmp_path: Path) -> None:
    process = python(TRAIN, *small(tmp_path), "model=opt-175b", "zero.offload=none")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "the run needs 3,252.3 GiB on the fullest rank" in line  # 20 bytes for each of 175 billion parameters
    assert "each of 1 processes on this machine can have" in line
    assert "plan.enforce=false" in line


def train_out_of_memory(*arguments: str) -> None:
    """In a process of its own: train with a device whose memory runs out in the first step."""
    from opt_parallel.commands.train import run
    from opt_parallel.engine import Engine

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of …")

    Engine.step = step  # type: ignore[method-assign, assignment]
    sys.argv = ["train.py", *arguments]
    run()


def test_when_memory_runs_out_the_user_reads_the_plan_and_what_to_try(tmp_path: Path) -> None:
    words = ["tests/support/call.py", __file__, "train_out_of_memory", *small(tmp_path), "batch.micro=4"]
    process = launch(1, *words)
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: out of memory (CUDA out of memory. Tried to allocate 2.50 GiB): ")
    assert "GiB were planned" in line
    assert "of tensors), and tensors had" in line
    assert ": try " in line
    assert "batch.micro=1 (" in line
