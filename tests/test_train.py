"""train.py as a user starts it: a user's mistakes, several runs at once, interruption and resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, environment, launch, python, small, start, torchrun, train_rows
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from training import trained

from opt_parallel.config.compose import explain
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["modle.dropout=0.1"], ["modle does not exist", "did you mean model?"]),
    "unknown field": (["model.droput=0.1"], ["model.droput does not exist", "did you mean model.dropout?"]),
    "added key": (["+foo=1"], ["foo does not exist"]),
    "added field": (["+model.foo=1"], ["model.foo does not exist"]),
    "wrong type": (["steps=many"], ["steps: Value 'many'", "Integer"]),
    "wrong choice": (["zero.offload=gpu"], ["zero.offload: Invalid value 'gpu'", "none, cpu"]),
    "unknown model": (["model=opt-3b"], ["model=opt-3b does not exist", "opt-1.3b, opt-125m"]),
    "unknown experiment": (["experiment=opt-125m"], ["experiment=opt-125m does not exist", "opt-125m-paper"]),
    "broken override": (["steps"], ["steps"]),
    "heads": (["parallel.tensor=3"], ["num_attention_heads=4", "parallel.tensor=3"]),
    "batch": (["batch.global=5"], ["batch.global=5", "batch.micro(2)"]),
    "world size": (["parallel.tensor=2"], ["tensor(2) ≠ world size 1"]),
    "sequence": (["data.sequence_length=512"], ["512", "128"]),
    "bf16 at stage 0": (["precision=bf16", "zero.stage=0"], ["precision=bf16", "zero.stage=0"]),
    "no data": (["data.train=null"], ["data.train"]),
    "missing file": (["data.train=no/such.txt"], ["no/such.txt"]),
    "missing checkpoint": (["resume=no/such"], ["no/such"]),
    "bad tokenizer": (["data.tokenizer=no/such/folder"], ["no/such/folder"]),
}


def said(process: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error, after checking that it is one and that no traceback came with it."""
    assert process.returncode == 2, process.stdout + process.stderr
    lines = [line for line in process.stderr.splitlines() if line]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


FEW = (
    "unknown key", "added field", "wrong type", "unknown model", "heads", "world size", "missing file",
    "missing checkpoint", "bad tokenizer",
)  # fmt: skip


def refused(crew: Any, *arguments: str) -> str:
    """The line of an error without a command: what `train.py` prints, or what it makes of an error of Hydra."""
    try:
        return said(trained(crew(1), *arguments))
    except (HydraException, OmegaConfBaseException) as error:
        return explain(error)


def test_a_mistake_is_one_line(crew: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for name in MISTAKES if request.config.getoption("long") else FEW:
        arguments, words = MISTAKES[name]
        line = refused(crew, *small(tmp_path), *arguments)
        assert all(word in line for word in words), (name, line)
    assert not (tmp_path / "run" / "checkpoints").exists()


AS_COMMANDS = ("unknown model", "missing file")  # an error of Hydra, and one after torch was imported


@pytest.mark.parametrize(
    "mistake", [pytest.param(each, marks=[] if each in AS_COMMANDS else pytest.mark.long) for each in MISTAKES]
)
def test_a_command_with_a_mistake_ends_with_status_2(tmp_path: Path, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    line = said(python("train.py", *small(tmp_path), *arguments))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_mistakes_in_the_data(crew: Any, tmp_path: Path) -> None:
    """Each with its words in tests/data; here that they come through as one line."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    arguments = small(tmp_path)
    assert f"{broken}, line 2" in refused(crew, *arguments, f"data.train={broken}")
    save_tokenizer(train_tokenizer(["fine words"] * 9, 300), tmp_path / "tokenizer")
    line = refused(crew, *arguments, f"data.tokenizer={tmp_path / 'tokenizer'}", "model.vocab_size=100")
    assert "vocab_size=100" in line


def test_an_unwritable_run_folder(crew: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert f"run.dir={blocked}" in refused(crew, *small(tmp_path), f"run.dir={blocked}")


def test_of_two_ranks_one_speaks_and_both_end_with_2(tmp_path: Path) -> None:
    arguments, words = MISTAKES["unknown key"]
    names = ("RANK", "LOCAL_RANK")
    ranks = [
        start(tmp_path / f"output-{rank}", "train.py", *small(tmp_path), *arguments, WORLD_SIZE="2",
              LOCAL_WORLD_SIZE="2", **dict.fromkeys(names, str(rank)))
        for rank in (0, 1)
    ]  # fmt: skip
    assert ranks[0].ended_within(100)
    os.kill(ranks[1].pid, signal.SIGTERM)  # as a launcher does
    assert ranks[1].ended_within(100)
    assert [rank.status for rank in ranks] == [2, 2]
    assert (tmp_path / "output-1").read_text() == ""
    (line,) = (tmp_path / "output-0").read_text().splitlines()
    assert all(word in line for word in words)


@pytest.mark.long
@pytest.mark.parametrize("mistake", ["unknown key", "missing file"])
def test_under_a_launcher_one_rank_speaks_and_all_end_with_2(tmp_path: Path, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    process = torchrun(2, "train.py", *small(tmp_path), *arguments)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert all(word in errors[0] for word in words)
    assert "train.py" not in process.stderr.replace("train.py FAILED", ""), "a rank printed a traceback"
    assert process.stderr.count("exitcode  : 2") == process.stderr.count("exitcode  :") > 0


@pytest.mark.parametrize("rates", [["0.1"], pytest.param(["0.0", "0.1"], marks=pytest.mark.long)])
def test_multirun_makes_a_folder_for_each(tmp_path: Path, rates: list[str]) -> None:
    (tmp_path / "other.txt").write_text("Another text, that is short but fills a block or two of sixteen tokens. " * 9)
    texts = f"data.train={tmp_path / 'text.jsonl'},{tmp_path / 'other.txt'}"
    process = python("train.py", "-m", *small(tmp_path), texts, f"model.dropout={','.join(rates)}", "steps=2")
    assert process.returncode == 0, process.stderr
    folders = sorted(path.parent for path in (tmp_path / "run").rglob("metrics.jsonl"))
    assert len(folders) == 2 * len(rates)
    swept = [folder.name.count("model.dropout=0.1") for folder in folders]
    assert sorted(swept) == ([0, 0, 1, 1] if len(rates) == 2 else [0, 0])
    assert sum(folder.name.count("other.txt") for folder in folders) == len(rates)
    fixed = ("model=", "logging", "steps", "run.dir")  # Hydra writes some of them otherwise than they were given
    assert not [folder for folder in folders if any(word in folder.name for word in fixed)]
    assert all(len(train_rows(folder)) == 2 for folder in folders)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_interrupted_and_started_again_is_the_straight_run(crew: Any, tmp_path: Path, processes: int) -> None:
    """By Ctrl-C, which a terminal sends to every process; of two ranks by a launcher's signal, to one of them."""
    arguments = [*small(tmp_path), "steps=600", "batch.micro=4", f"parallel.tensor={processes}", "model.layerdrop=0.2"]
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200

    def wait_for_three_steps() -> None:
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.02)

    if processes == 1:
        process = start(tmp_path / "output", "train.py", *arguments)
        wait_for_three_steps()
        os.killpg(process.pid, signal.SIGINT)
        assert process.ended_within(100)
        status, output = process.status, (tmp_path / "output").read_text()
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
        with subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.PIPE, start_new_session=True) as launcher:  # fmt: skip
            wait_for_three_steps()
            header = (tmp_path / "run" / "logs" / "rank-00001.log").read_text().partition("\n")[0]
            os.kill(int(header.rpartition("process ")[2]), signal.SIGUSR1)
            output, errors = launcher.communicate(timeout=100)
        status = launcher.returncode
        assert errors.count("exitcode  : 75") == errors.count("exitcode  :") == 2  # torchrun's own is always 1
    assert "the same command continues the run" in output
    assert status == (130 if processes == 1 else 1)
    assert (tmp_path / "run" / "state").read_text() == "stopped\n"
    steps = [row["step"] for row in train_rows(tmp_path / "run")]
    assert 3 <= len(steps) < 600
    arguments.append(f"stop_at={steps[-1] + 3}")
    again = trained(crew(1), *arguments) if processes == 1 else launch(processes, "train.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert f"continuing at step {steps[-1]}" in again.stdout
    straight = trained(crew(processes), *arguments, f"run.dir={tmp_path / 'straight'}")
    assert straight.returncode == 0
    assert [(row["step"], row["loss"]) for row in train_rows(tmp_path / "run")] == [
        (row["step"], row["loss"]) for row in train_rows(tmp_path / "straight")
    ]
    (tmp_path / "run" / "state").unlink()
    finished = trained(crew(processes), *arguments)
    assert finished.returncode == 0
    assert (tmp_path / "run" / "state").read_text() == "done\n"
    assert "a larger stop_at continues the run" in finished.stdout
