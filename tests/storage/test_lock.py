"""One writer in a folder: what a second one is told, what a crash leaves, on file systems with and without locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT, environment
from faults import faults, why_not

from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.lock import LOCK, Writer, only_writer

needs_faults = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
NO_LOCKS = "flock ENOSYS *"

WRITER = """
import sys, time
from pathlib import Path
from opt_parallel.runtime.errors import reporting
from opt_parallel.storage import lock
folder, kernel, silent = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if kernel:
    lock.running_kernel = lambda: kernel
with reporting(), lock.only_writer(folder, "run.dir=here", beat=0.2, silent=silent):
    print("writes", flush=True)
    sys.stdin.read()
print("ended", flush=True)
"""


class Process:
    """A process that wants to write to a folder; `kernel` as if on a host of its own."""

    def __init__(self, folder: Path, kernel: str = "", silent: float = 1.5, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, folder, kernel, str(silent)], cwd=ROOT, text=True, bufsize=1,
            env=environment(PYTHONPATH=str(ROOT), **env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, list[str]]:
        """Let it end in good order; its status, and the mistakes that it printed."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors.splitlines()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def assert_refused(second: Process, first: Process) -> None:
    status, errors = second.end()
    assert status == 2
    assert len(errors) == 1
    for part in ("run.dir=here", f"process {first.process.pid} on {os.uname().nodename}"):
        assert part in errors[0]


@pytest.mark.parametrize("rules", [[], [NO_LOCKS]], ids=["locks", "no locks"])
def test_a_second_is_refused_until_the_first_has_ended(tmp_path: Path, rules: list[str]) -> None:
    if rules and why_not():
        pytest.skip(str(why_not()))
    env = faults(*rules) if rules else {}
    first = Process(tmp_path, **env)
    assert first.line() == "writes"
    assert_refused(Process(tmp_path, **env), first)
    assert first.end() == (0, [])
    third = Process(tmp_path, silent=60, **env)
    assert third.line() == "writes"  # at once
    third.kill()


def test_a_killed_one_keeps_nobody_out(tmp_path: Path) -> None:
    first = Process(tmp_path)
    assert first.line() == "writes"
    first.kill()
    second = Process(tmp_path, silent=60)
    assert second.line() == "writes"  # without waiting for a sign of life
    assert_refused(Process(tmp_path), second)
    second.kill()


def test_a_file_that_was_removed_is_held_anew(tmp_path: Path) -> None:
    first = Process(tmp_path)
    assert first.line() == "writes"
    (tmp_path / LOCK).unlink()
    while not ((tmp_path / LOCK).exists() and (tmp_path / LOCK).read_bytes()):
        time.sleep(0.02)
    assert_refused(Process(tmp_path), first)
    assert first.end() == (0, [])


def test_a_stopped_one_still_holds_it(tmp_path: Path) -> None:
    first = Process(tmp_path)
    assert first.line() == "writes"
    first.process.send_signal(signal.SIGSTOP)
    assert_refused(Process(tmp_path), first)
    first.kill()


@needs_faults
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_where_there_are_no_locks_a_silent_one_is_replaced(tmp_path: Path, how: signal.Signals) -> None:
    """And ends as soon as it wakes up."""
    first = Process(tmp_path, **faults(NO_LOCKS))
    assert first.line() == "writes"
    first.process.send_signal(how)
    second = Process(tmp_path, **faults(NO_LOCKS))
    assert "waiting" in second.line()
    assert second.line() == "writes"
    if how is signal.SIGSTOP:
        first.process.send_signal(signal.SIGCONT)
        assert first.process.wait(10) == 2
        assert first.process.stderr is not None
        assert f"process {second.process.pid}" in first.process.stderr.read()
    assert second.end() == (0, [])


@needs_faults
def test_where_there_are_no_locks_one_of_two_at_once_writes(tmp_path: Path) -> None:
    both = [Process(tmp_path, silent=20, **faults(NO_LOCKS)) for _ in range(2)]
    while all(process.process.poll() is None for process in both):
        time.sleep(0.1)
    refused, writing = sorted(both, key=lambda process: process.process.poll() is None)
    assert_refused(refused, writing)
    assert writing.line() == "writes"
    assert writing.end() == (0, [])


@needs_faults
@pytest.mark.parametrize("how", [None, signal.SIGKILL])
def test_locks_that_do_not_reach_another_host(tmp_path: Path, how: signal.Signals | None) -> None:
    """Two kernels that each grant the lock: the heartbeat tells."""
    first = Process(tmp_path, kernel="A")
    assert first.line() == "writes"
    if how is not None:
        first.process.send_signal(how)
    second = Process(tmp_path, kernel="B", **faults(NO_LOCKS))
    assert "waiting" in second.line()
    if how is None:
        assert_refused(second, first)
        assert first.end() == (0, [])
    else:
        assert second.line() == "writes"
        assert second.end() == (0, [])


def test_a_lock_that_outlives_its_host(tmp_path: Path) -> None:
    """As a file server keeps it for a client that lost its power: silent, but locked."""
    first = Process(tmp_path, kernel="A")
    assert first.line() == "writes"
    first.process.send_signal(signal.SIGSTOP)
    second = Process(tmp_path, kernel="B")
    assert "waiting" in second.line()
    status, errors = second.end()
    assert status == 2
    assert f"remove {tmp_path / LOCK}" in errors[0]
    third = Process(tmp_path, kernel="B", silent=60)
    assert "waiting" in third.line()
    first.kill()  # the server gives it up meanwhile
    third.kill()
    (tmp_path / LOCK).unlink()
    fourth = Process(tmp_path, kernel="B", silent=60)
    assert fourth.line() == "writes"
    fourth.kill()


def test_what_it_was_given_is_whole_again_after_a_clean_end(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with only_writer(folder, "run.dir=here"):
        assert (folder / LOCK).stat().st_size > 0
    assert (folder / LOCK).stat().st_size == 0
    with only_writer(folder, "run.dir=here"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 512, "nonsense"])
def test_whatever_stands_in_it_a_free_lock_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    began = time.monotonic()
    with only_writer(tmp_path, "run.dir=here"):
        assert time.monotonic() - began < 5


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run.dir=here.*cannot be written"):
        only_writer(tmp_path / "file", "run.dir=here").__enter__()


def test_all_of_one_kernel_agree_on_it() -> None:
    assert Writer.this().kernel == Writer.this().kernel != ""
    assert Writer.this().token != Writer.this().token
