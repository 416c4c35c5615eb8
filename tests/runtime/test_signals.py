"""A run whose terminal closes, and with --long the table that `signals.py` makes."""

from __future__ import annotations

import os
import pty
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from command import ROOT, environment, fork_server, small, train_rows
from signals import CELLS, end_one, end_with_children, trains

from opt_parallel.checkpoint.folders import newest, step_of


def test_a_run_whose_terminal_closes_is_saved(tmp_path: Path) -> None:
    run, (master, terminal) = tmp_path / "run", pty.openpty()
    os.set_blocking(master, False)
    process = fork_server().start(["train.py", *small(tmp_path), "steps=2000"], ROOT, environment(), terminal, terminal)
    os.close(terminal)
    while not trains(run):
        assert not process.ended_within(0.02)
        with suppress(BlockingIOError):
            os.read(master, 4096)
    os.close(master)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.ended_within(100)
    assert (process.status, (run / "state").read_text()) == (75, "stopped\n")
    last = newest(run / "checkpoints")
    assert last is not None
    assert step_of(last) == len(train_rows(run)) < 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all cells, which share their text and the straight runs."""
    return tmp_path_factory.mktemp("signals")


@pytest.mark.long
@pytest.mark.parametrize(("launcher", "terminal", "name"), CELLS)
def test_a_run_that_is_ended_is_saved_and_goes_on(folder: Path, launcher: str, terminal: str, name: str) -> None:
    cell = end_one(folder, launcher, terminal, name)
    assert cell.right, cell


@pytest.mark.long
@pytest.mark.parametrize("stream", [False, True], ids=["prepare", "stream"])
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT", "USR1", "KILL"])
def test_a_run_s_own_processes_end_with_it(folder: Path, launcher: str, name: str, stream: bool) -> None:
    state, children, left = end_with_children(folder, launcher, name, stream)
    assert children >= (1 if stream else 2)
    assert left == 0
    if stream and (launcher, name) != ("python", "KILL"):
        assert state == "stopped"
