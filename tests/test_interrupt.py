"""Signals to a process of its own: noted once it is patient, deadly before that and the second time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, environment

# Says when it is ready for a signal, and then what came of it. `hang`: as in a collective whose other ranks are gone.
PROGRAM = """
import sys, time
from opt_parallel import interrupt as module
module.SAME_REQUEST = float(sys.argv[1])
with module.Interrupt.watch() as interrupt:
    interrupt.patient = sys.argv[2] != "impatient"
    interrupt.last_words = lambda: print("last words", flush=True)
    if sys.argv[2] == "hang":
        from datetime import timedelta
        from torch._C._distributed_c10d import HashStore
        print("ready", flush=True)
        HashStore().wait(["nothing"], timedelta(seconds=60))
    print("ready", flush=True)
    for _ in range(6000):
        if interrupt.status and interrupt.patient:
            print("asked", interrupt.status, flush=True)
            break
        time.sleep(0.01)
    sys.stdin.readline()
print("ended")
"""


def started(how: str, same_request: float = 5.0, nohup: bool = False, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        ["nohup"] * nohup + [sys.executable, "-c", PROGRAM, str(same_request), how], cwd=ROOT,
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
    with started("patient", nohup=True) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "asked 130\n"
        process.communicate("\n", timeout=60)


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
    from opt_parallel.interrupt import STATUS, Interrupt

    before = [signal.getsignal(number) for number in STATUS]
    with Interrupt.watch() as interrupt:
        interrupt.patient = True
        signal.raise_signal(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in STATUS] == before
    assert signal.set_wakeup_fd(-1) == -1
