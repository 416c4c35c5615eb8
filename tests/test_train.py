"""train.py as a user starts it: a user's mistakes, several runs at once, interruption and resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT, environment, launch, python, small, start, torchrun, train_rows

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


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    line = said(python("train.py", *small(tmp_path), *arguments))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_mistakes_in_the_data(tmp_path: Path) -> None:
    """Each with its words in tests/data; here that they come through as one line."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    arguments = small(tmp_path)
    assert f"{broken}, line 2" in said(python("train.py", *arguments, f"data.train={broken}"))
    assert python("train.py", *arguments, "steps=1").returncode == 0
    tokenizer = next((tmp_path / "cache").glob("tokenizer-*/tokenizer.json")).parent
    line = said(python("train.py", *arguments, f"data.tokenizer={tokenizer}", "model.vocab_size=100"))
    assert "vocab_size=100" in line


def test_an_unwritable_run_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert f"run.dir={blocked}" in said(python("train.py", *small(tmp_path), f"run.dir={blocked}"))


@pytest.mark.parametrize("mistake", ["unknown key", pytest.param("missing file", marks=pytest.mark.long)])
def test_under_a_launcher_one_rank_speaks_and_all_end_with_2(tmp_path: Path, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    process = torchrun(2, "train.py", *small(tmp_path), *arguments)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert all(word in errors[0] for word in words)
    assert "train.py" not in process.stderr.replace("train.py FAILED", ""), "a rank printed a traceback"
    assert process.stderr.count("exitcode  : 2") == process.stderr.count("exitcode  :") > 0


def test_multirun_makes_a_folder_for_each(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Another text, that is short but fills a block or two of sixteen tokens. " * 9)
    texts = f"data.train={tmp_path / 'text.jsonl'},{tmp_path / 'other.txt'}"
    process = python("train.py", "-m", *small(tmp_path), texts, "model.dropout=0.0,0.1", "steps=2")
    assert process.returncode == 0, process.stderr
    folders = sorted(path.parent for path in (tmp_path / "run").rglob("metrics.jsonl"))
    assert len(folders) == 4
    assert sorted(folder.name.count("model.dropout=0.1") for folder in folders) == [0, 0, 1, 1]
    assert sorted(folder.name.count("other.txt") for folder in folders) == [0, 0, 1, 1]
    fixed = ("model=", "logging", "steps", "run.dir")  # Hydra writes some of them otherwise than they were given
    assert not [folder for folder in folders if any(word in folder.name for word in fixed)]
    assert [len(train_rows(folder)) for folder in folders] == [2, 2, 2, 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_and_started_again_is_the_straight_run(tmp_path: Path, processes: int) -> None:
    """By Ctrl-C, which a terminal sends to every process; of two ranks by a launcher's signal, to one of them."""
    arguments = [*small(tmp_path), "steps=600", f"parallel.tensor={processes}", "model.layerdrop=0.2"]
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
    arguments.append(f"stop_at={steps[-1] + 5}")
    again = launch(processes, "train.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert f"continuing at step {steps[-1]}" in again.stdout
    if processes == 1:
        (tmp_path / "run" / "state").unlink()
        finished = launch(processes, "train.py", *arguments)
        assert finished.returncode == 0
        assert (tmp_path / "run" / "state").read_text() == "done\n"
        assert "a larger stop_at continues the run" in finished.stdout
        return
    straight = launch(processes, "train.py", *arguments, f"run.dir={tmp_path / 'straight'}")
    assert straight.returncode == 0
    assert [(row["step"], row["loss"]) for row in train_rows(tmp_path / "run")] == [
        (row["step"], row["loss"]) for row in train_rows(tmp_path / "straight")
    ]
