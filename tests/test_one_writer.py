"""Two starts in one run's folder: the second is told who trains there, and the first does not notice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import small, start
from training import trained
from two_starts import RUN, assert_names, assert_undisturbed


def wait_for(happened: Callable[[], bool], ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert not ended()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(
    crew: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, list[str]]:
    """The folder of a run that nobody disturbs, and its arguments."""
    folder = tmp_path_factory.mktemp("straight")
    steps = [] if request.config.getoption("long") else ["steps=20"]  # the long tests wait for a save
    arguments = [*small(folder), *RUN, *steps]
    process = trained(crew(1), *arguments)
    assert process.returncode == 0, process.stderr
    return folder / "run", arguments


def test_a_second_start_changes_nothing(crew: Any, straight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Of the same run, and of one with other settings, while the first trains."""
    run = tmp_path / "run"
    arguments = [*straight[1], f"run.dir={run}"]
    first = start(tmp_path / "first", "train.py", *arguments)
    wait_for((run / "state").exists, lambda: first.ended_within(0))
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not end too soon
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for other in ([], ["optimizer.lr=5e-3", "seed=7"]):
        second = trained(crew(1), *arguments, *other)
        assert second.returncode == 2, second.stdout
        assert_names(second.stderr.splitlines(), run)
        assert second.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    os.kill(first.pid, signal.SIGCONT)
    assert first.ended_within(240)
    assert first.status == 0, (tmp_path / "first").read_text()
    assert_undisturbed(run, straight[0])


@pytest.mark.long
def test_a_killed_one_keeps_nobody_out(crew: Any, straight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """And what it left goes, in a run with something left to do."""
    run = tmp_path / "run"
    arguments = [*straight[1], f"run.dir={run}"]
    first = start(tmp_path / "first", "train.py", *arguments)
    wait_for((run / "checkpoints" / "step-10").is_dir, lambda: first.ended_within(0))
    os.kill(first.pid, signal.SIGKILL)
    assert first.ended_within(60)
    leftovers = ["state.elsewhere-01234567.partial", "checkpoints/step-20.partial77", "checkpoints/step-30.partial"]
    for name in leftovers:
        (run / name).mkdir(parents=True)
    second = trained(crew(1), *arguments)
    assert second.returncode == 0, second.stderr
    assert "continuing at step" in second.stdout
    assert_undisturbed(run, straight[0])
    assert not list(run.rglob("*.partial*"))


@pytest.mark.long
def test_of_two_starts_at_once_one_trains(straight: tuple[Path, list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*straight[1], f"run.dir={run}"]
    outputs = [tmp_path / "one", tmp_path / "other"]
    both = [start(output, "train.py", *arguments) for output in outputs]
    one, other = both
    wait_for((run / "checkpoints" / "step-10").is_dir, lambda: one.ended_within(0) and other.ended_within(0))
    header = (run / "logs" / "rank-00000.log").read_text().partition("\n")[0]
    first = int(header.rpartition("process ")[2])
    os.kill(first, signal.SIGSTOP)  # so that it does not end before the other starts
    assert all(process.ended_within(240) for process in both if process.pid != first)
    os.kill(first, signal.SIGCONT)
    assert all(process.ended_within(240) for process in both)
    texts = {process.status: output.read_text() for process, output in zip(both, outputs, strict=True)}
    assert sorted(texts) == [0, 2], texts
    assert_names(texts[2].splitlines(), run)
    assert_undisturbed(run, straight[0])
