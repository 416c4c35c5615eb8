"""Signals to a process of its own: noted once it can save, deadly before that and the second time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT, environment

# Says when it is ready for a signal, and then what came of it. `hang`: as in a collective whose other ranks are gone.
PROGRAM = """
import sys, time
from opt_parallel.runtime import signals as module
module.SAME_REQUEST, module.CHECK_EVERY = float(sys.argv[1]), 0.02
with module.Interrupt.watch() as interrupt:
    interrupt.can_save = sys.argv[2] != "impatient"
    interrupt.last_words = lambda: print("last words", flush=True)
    if sys.argv[2] == "hang":
        from datetime import timedelta
        from torch._C._distributed_c10d import HashStore
        print("ready", flush=True)
        HashStore().wait(["nothing"], timedelta(seconds=60))
    print("ready", flush=True)
    for _ in range(6000):
        if interrupt.status and interrupt.can_save:
            print("asked", interrupt.status, flush=True)
            break
        time.sleep(0.01)
    sys.stdin.readline()
print("ended")
"""


def started(how: str, *before: str, same_request: float = 5.0, **env: str) -> subprocess.Popen[str]:
    """`before`: the words in front of the program's."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM, str(same_request), how], cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), **env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGQUIT, 75)],
    ids=str,
)
def test_once_is_noted_and_twice_at_the_same_time_is_once(number: int, status: int) -> None:
    with started("patient") as process:
        assert process.stdout is not None
        process.send_signal(number)
        assert process.stdout.readline() == f"asked {status}\n"
        process.send_signal(signal.SIGINT)  # from a terminal and from a launcher
        output, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, output, errors) == (0, "ended\n", "")


def test_nohup_keeps_a_hangup_off() -> None:
    with started("patient", "nohup") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "asked 130\n"
        process.communicate("\n", timeout=60)


PARENT = ("sh", "-c", '"$@"; exit', "sh")  # a process between, with the program's end of its pipes


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_a_launcher_s_end_is_a_request(launcher: str) -> None:
    with started("patient", *PARENT, **{launcher: "0"}) as process:
        process.kill()
        output, errors = process.communicate("\n", timeout=50)
    gone = f"warning: the launcher, process {process.pid}, has ended: this run stops as on SIGTERM\n"
    assert (output, errors) == (f"{gone}asked 75\nended\n", "")


def test_a_launcher_s_end_is_none_once_it_was_asked() -> None:
    """torchrun may end while its ranks save, as a second Ctrl-C has it."""
    with started("patient", *PARENT, same_request=0.0, TORCHELASTIC_RUN_ID="0") as process:
        assert process.stdout is not None
        os.kill(child_of(process.pid), signal.SIGTERM)
        assert process.stdout.readline() == "asked 75\n"
        process.kill()
        time.sleep(1.0)  # for many looks
        output, errors = process.communicate("\n", timeout=50)
    assert (output, errors) == ("ended\n", "")


def test_before_the_first_step_a_launcher_s_end_is_the_end() -> None:
    with started("impatient", *PARENT, TORCHELASTIC_RUN_ID="0") as process:
        process.kill()
        output, errors = process.communicate(timeout=50)
    assert (output.count("has ended"), errors) == (1, "error: interrupted\n")


def test_a_shell_may_end() -> None:
    """After `python train.py &`, in which no launcher has a part."""
    with started("patient", *PARENT) as process:
        program = child_of(process.pid)
        process.kill()
        time.sleep(1.0)  # for many looks
        os.kill(program, signal.SIGINT)
        output, errors = process.communicate("\n", timeout=50)
    assert (output, errors) == ("asked 130\nended\n", "")


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_a_second_one_ends_it_though_it_hangs() -> None:
    with started("hang", same_request=0.0) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=50)
    assert (process.returncode, output, errors) == (75, "last words\n", "error: interrupted\n")


@pytest.mark.parametrize(
    ("number", "size", "status", "words"),
    [
        (signal.SIGINT, 1, 130, "last words\n"), (signal.SIGTERM, 1, 75, "last words\n"),
        (signal.SIGTERM, 2, 75, ""), (signal.SIGUSR1, 2, 75, "last words\n"), (signal.SIGHUP, 2, 75, "last words\n"),
    ],
)  # fmt: skip
def test_before_the_first_step_one_is_enough(number: int, size: int, status: int, words: str) -> None:
    """And only what is surely a request says that the run is to be continued: SIGTERM comes from a launcher, too."""
    with started("impatient", RANK="0", WORLD_SIZE=str(size)) as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=50)
    assert (process.returncode, output, errors) == (status, words, "error: interrupted\n")


def test_handlers_are_put_back(tmp_path: Path) -> None:
    from opt_parallel.runtime.signals import STATUS, Interrupt

    before = [signal.getsignal(number) for number in STATUS]
    with Interrupt.watch() as interrupt:
        interrupt.can_save = True
        signal.raise_signal(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in STATUS] == before
    assert signal.set_wakeup_fd(-1) == -1
