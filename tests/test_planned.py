"""The planned memory of a run: its line, the refusal of what cannot fit, and the advice when memory runs out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command import ROOT, small
from composing import run_of
from training import trained

from opt_parallel.benchmarks.runs import composed
from opt_parallel.config.run import Run
from opt_parallel.planned import GIB, SHEETS, Devices, _check, out_of_memory
from opt_parallel.runtime.errors import UserError

PAGE = ROOT / "docs" / "planning.md"
A100 = Devices("NVIDIA A100-SXM4-80GB", round(79.2 * GIB), hosts=1, per_host=8)


def test_a_run_prints_its_planned_memory(crew: Any, tmp_path: Path) -> None:
    process = trained(crew(1), *small(tmp_path), "steps=1")
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("planned memory: ")]
    assert "for weights and states" in line


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(crew: Any, tmp_path: Path) -> None:
    process = trained(crew(1), *small(tmp_path), "model=opt-175b", "zero.offload=none")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "the run needs 3,252.3 GiB on the fullest rank" in line  # 20 bytes for each of 175 billion parameters
    assert "each of 1 processes on this machine can have" in line
    assert "plan.enforce=false" in line


def opt_13b() -> Run:
    run = composed(["model=opt-13b", "precision=bf16", "zero.stage=3", "batch.micro=4"])
    return dataclasses.replace(run, batch={"global": 512, "micro": 4})


def test_the_page_has_the_messages() -> None:
    """A line break in the page stands for a space."""
    page = " ".join(PAGE.read_text().split())
    why = "CUDA out of memory. Tried to allocate 3.07 GiB. GPU 0 has a total capacity of 79.15 GiB of which …"
    assert f"error: {out_of_memory(why, opt_13b(), A100, round(66.3 * GIB))}" in page
    with pytest.raises(UserError) as refused:
        _check(opt_13b(), dataclasses.replace(A100, name="NVIDIA A100-PCIE-40GB", memory=round(39.4 * GIB)))
    assert f"error: {refused.value}" in page


def test_a_known_gpu_takes_the_rates_of_its_file() -> None:
    for name, file in SHEETS.items():
        cluster = dataclasses.replace(A100, name=name).cluster()
        family = file.partition("-")[0]
        assert family.upper() in name, name
        assert cluster.device.name.endswith(family) or f"{family}-" in cluster.device.name, name


def test_rates_that_are_not_a_devices_own_are_named() -> None:
    for name in ("NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA L40S", "AMD Instinct MI300X"):
        assert f"because those of {name} are unknown" in dataclasses.replace(A100, name=name).source_of_rates
    assert "assumed rates" in dataclasses.replace(A100, name=None).source_of_rates


def train_out_of_memory(run: Run) -> str:
    """On the crew: the error of a run on a device whose memory runs out in the first step."""
    from opt_parallel.engine import Engine
    from opt_parallel.loop import train

    why = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of …"
    with mock.patch.object(Engine, "step", side_effect=torch.OutOfMemoryError(why)), pytest.raises(UserError) as raised:
        train(run)
    return str(raised.value)


def test_when_memory_runs_out_the_user_reads_the_plan_and_what_to_try(crew: Any, tmp_path: Path) -> None:
    (line,) = crew(1)(train_out_of_memory, run_of(*small(tmp_path), "batch.micro=4"))
    assert "\n" not in line
    assert line.startswith("out of memory (CUDA out of memory. Tried to allocate 2.50 GiB): ")
    assert "GiB were planned" in line
    assert "of tensors), and tensors had" in line
    assert ": try " in line
    assert "batch.micro=1 (" in line
