"""The command `plan`: its tables, JSON, picture and mistakes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import ROOT, cold_python, python
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from opt_parallel.commands.plan import check_layout, composed, main, planned_on, stored_bytes
from opt_parallel.config.compose import explain
from opt_parallel.config.run import ParallelConfig, Run
from opt_parallel.config.task import LoraConfig, TaskConfig
from opt_parallel.planning.compose import keys_from
from opt_parallel.planning.loading import loading
from opt_parallel.planning.reliability import reliability
from opt_parallel.planning.text import VALIDATION, text
from opt_parallel.runtime.errors import UserError

PLAN = str(ROOT / "scripts" / "plan.py")
OPT_30B = ["model=opt-30b", "cluster=h100-80gb", "cluster.nodes=2", "parallel.tensor=4", "batch.global=64"]


def test_a_plan_says_what_fits_and_how_fast_it_is_without_torch() -> None:
    words = ["plan", *OPT_30B, "activation_checkpointing=selective", "cluster.price=2.5"]
    program = f"import sys; sys.argv = {words!r}; from opt_parallel.commands.plan import run; run()"
    process = cold_python("-c", f"{program}; print('torch' in sys.modules, file=sys.stderr)")
    assert process.returncode == 0, process.stderr
    said = process.stdout
    assert "on 16 × h100-80gb on 2 hosts: data(4) × tensor(4)" in said
    for words in ("fits: ", "tokens/s a device", "MFU", "cost $", "strong: tokens/s", "4,096", "checkpoint.every="):
        assert words in said, said
    assert process.stderr.splitlines()[-1] == "False"


def test_json_has_the_same_and_its_parts_add_up(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    process = python(PLAN, *OPT_30B, "zero.stage=auto", "batch.micro=auto", "--json", "--picture", str(picture))
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    memory, time = found["plan"]["memory"], found["plan"]["time"]
    parts = [size for kind, size in memory.items() if kind not in ("total", "limit", "host", "peak_at")]
    assert sum(parts) == memory["total"]
    assert sum(seconds for part, seconds in time.items() if part != "step") == pytest.approx(time["step"])
    assert found["choice"]["fitting"] <= found["choice"]["searched"]
    assert found["scaling"]["weak"][-1]["devices"] == 4096
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["cluster=h1000"], "cluster=h1000 does not exist: choose"),
        (["cluster=1000"], "cluster=1000 does not exist: choose"),
        (["cluster.nodes=-1"], "cluster.nodes=-1 must be at least 1"),
        (["cluster.nods=2"], "cluster.nods does not exist: did you mean cluster.nodes?"),
        (["cluster.price=-2"], "cluster.price=-2.0 must not be negative"),
        (["cluster.memory=0"], "cluster.memory=0.0 must be positive: GiB"),
        (["cluster.nodes=many"], "cluster.nodes"),
        (["model.hiden_size=8"], "model.hiden_size does not exist: did you mean model.hidden_size?"),
        (["parallel.tensor=3"], "= 8 devices are not a multiple of parallel.tensor=3"),
        (["model=opt-175b", "parallel.tensor=auto", "zero.stage=auto"], "no settings fit on 8 × h100-80gb"),
        pytest.param(["modle=opt-30b"], "modle", marks=pytest.mark.long),
        pytest.param(["--picture", "/nonexistent/plan.png"], "/nonexistent/plan.png", marks=pytest.mark.long),
        pytest.param(["optimizer.lr=auto"], "optimizer.lr", marks=pytest.mark.long),
    ],
)
def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, words: list[str], line: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as raised:
        main()
    (said,) = explain(raised.value).splitlines()
    assert line in said


@pytest.mark.parametrize(
    ("words", "tensor", "batch", "line"),
    [
        ([], 3, 8, "cluster.nodes=1 × cluster.gpus=8 = 8 devices are not a multiple of parallel.tensor=3: choose"),
        (["cluster.gpus=6", "cluster.nodes=2"], 4, 8, "per host: a tensor group would span hosts; choose"),
        ([], 1, 9, "batch.global=9 is not a multiple of batch.micro(1) × data(8)"),
    ],
)
def test_a_run_that_does_not_divide_over_the_devices(words: list[str], tensor: int, batch: int, line: str) -> None:
    run = Run(parallel=ParallelConfig(tensor=tensor), batch={"global": batch, "micro": 1})
    with pytest.raises(UserError) as raised:
        check_layout(run, keys_from(words).cluster)
    assert line in str(raised.value)


@pytest.mark.parametrize(
    ("word", "line"),
    [("cluster.nodes=many", "error: cluster.nodes: "), ("cluster.nodes=-1", "error: cluster.nodes=-1 must be")],
)
def test_a_mistake_ends_with_status_2(word: str, line: str) -> None:
    process = python(PLAN, word)
    assert (process.returncode, process.stdout) == (2, "")
    (said,) = process.stderr.splitlines()
    assert said.startswith(line)


def test_rates_that_were_not_fitted_are_named() -> None:
    _, run = composed([], ["model=opt-125m"])
    for words, named in ((["cluster=l4"], True), (["cluster.device=mine"], True), (["cluster=h200-141gb"], False)):
        cluster = keys_from(words).cluster
        plan, _ = planned_on(run, cluster, [])
        said = text(plan, None, [], reliability(plan, cluster), VALIDATION)
        assert ("were fitted: the times assume that it reaches" in said) is named, words


def test_what_the_ranks_read_of_init_from(tmp_path: Path) -> None:
    """A part of the weights each. ZeRO does not divide what a rank reads, and LoRA's frozen base is not updated."""
    from metaseq_175b import write_sparse
    from metaseq_forms import Size

    write_sparse(tmp_path / "small", Size(layers=2, hidden=1024, heads=8, ffn=4096, rows=50272, positions=2048), 2, 3)
    words = [f"init_from={tmp_path / 'small'}", "data.tokenizer=x", "parallel.tensor=2", "batch.global=8"]
    config, run = composed(["cluster=a100-80gb", "cluster.storage=2"], [*words, "zero.stage=3"])
    plan, _ = planned_on(run, config.cluster, [])
    found = loading(plan, config.cluster, stored_bytes(run.init_from))
    split = 2 * (run.model.parameters() - 2050 * 1024)  # each rank has all positions, biases and norms
    assert found.stored == 2 * run.model.parameters()
    assert found.rank == pytest.approx(split / 2 + 2 * 2050 * 1024, rel=1e-3)
    assert found.seconds == pytest.approx(8 * found.rank / 2e9)
    said = text(plan, None, [], None, VALIDATION, found)
    assert "has 158 MB of weights: a rank reads 80.9 MB, and all ranks read 647 MB, in 0.3 seconds at" in said
    lora, _ = planned_on(replace(run, task=TaskConfig(lora=LoraConfig(rank=8))), config.cluster, [])
    assert lora.time.optimizer < plan.time.optimizer / 100


def test_train_names_plan_for_auto() -> None:
    process = python(str(ROOT / "train.py"), "model=opt-tiny", "zero.stage=auto")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: zero.stage=auto: auto is a value for opt-parallel plan, which finds")
