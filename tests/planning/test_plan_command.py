"""The command `plan`: its tables, JSON, picture and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import ROOT, cold_python, python

from opt_parallel.commands.plan import plan_run

PLAN = str(ROOT / "scripts" / "plan.py")
OPT_30B = ["model=opt-30b", "cluster=h100-80gb", "cluster.nodes=2", "parallel.tensor=4", "batch.global=64"]


def test_a_plan_says_what_fits_and_how_fast_it_is() -> None:
    process = python(PLAN, *OPT_30B, "activation_checkpointing=selective", "cluster.price=2.5")
    assert process.returncode == 0, process.stderr
    said = process.stdout
    assert "on 16 × h100-80gb on 2 hosts: data(4) × tensor(4)" in said
    for words in ("fits: ", "tokens/s a device", "MFU", "cost $", "strong: tokens/s", "4,096", "checkpoint.every="):
        assert words in said, said


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


def test_a_plan_imports_no_torch() -> None:
    program = (
        f"import sys; sys.argv = ['plan', *{OPT_30B!r}]; from opt_parallel.commands.plan import run; run(); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    process = cold_python("-c", program)
    assert process.stderr.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["cluster=h1000"], "cluster=h1000 does not exist: choose"),
        (["cluster=1000"], "cluster=1000 does not exist: choose"),
        (["cluster.nodes=-1"], "cluster.nodes=-1 must be at least 1"),
        (["cluster.nods=2"], "cluster.nods does not exist: did you mean cluster.nodes?"),
        (["cluster.price=-2"], "cluster.price=-2.0 must not be negative"),
        (["cluster.nodes=many"], "cluster.nodes"),
        (["modle=opt-30b"], "modle"),
        (["model.hiden_size=8"], "model.hiden_size does not exist: did you mean model.hidden_size?"),
        (["parallel.tensor=3"], "cluster.nodes=1 × cluster.gpus=8 = 8 devices are not a multiple of parallel.tensor=3"),
        (["cluster.gpus=6", "cluster.nodes=2", "parallel.tensor=4"], "a tensor group would span hosts"),
        (["batch.global=9"], "batch.global=9 is not a multiple of batch.micro(1) × data(8)"),
        (["model=opt-175b", "parallel.tensor=auto", "zero.stage=auto"], "no settings fit on 8 × h100-80gb"),
        (["--picture", "/nonexistent/plan.png"], "/nonexistent/plan.png"),
        (["optimizer.lr=auto"], "optimizer.lr"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str) -> None:
    process = python(PLAN, *words)
    assert process.returncode == 2, process.stdout
    (said,) = process.stderr.splitlines()
    assert line in said


def test_rates_that_were_not_fitted_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in ((["cluster=l4"], True), (["cluster.device=mine"], True), (["cluster=h200-141gb"], False)):
        plan_run(["model=opt-125m", *words], False, None)
        assert ("were fitted: the times assume that it reaches" in capsys.readouterr().out) is named, words


def test_train_names_plan_for_auto() -> None:
    process = python(str(ROOT / "train.py"), "model=opt-tiny", "zero.stage=auto")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: zero.stage=auto: auto is a value for opt-parallel plan, which finds")
