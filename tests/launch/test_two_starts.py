"""Two starts in one run's folder, of one and of two ranks, on one host and on two: a table of what each printed.

python -m pytest --long -s tests/launch/test_two_starts.py
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from command import ROOT, environment, python, small
from hosts import two_hosts, why_not
from test_one_writer import LAUNCHER, RUN, assert_names, assert_undisturbed

pytestmark = pytest.mark.long
PATIENCE = 300.0
KERNEL = "/proc/sys/kernel/random/boot_id"

Started = subprocess.Popen[bytes]


def start(output: Path, command: Sequence[str]) -> Started:
    with output.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)


def command(arguments: list[str], ranks: int) -> list[str]:
    return [sys.executable, *(LAUNCHER if ranks == 2 else []), "train.py", *arguments]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ours(output: Path) -> list[str]:
    """What the run said: less torchrun's own report."""
    begins = ("error: ", "warning: ", "starting", "continuing", "finished", "stopped", "opt-tiny is", "/")
    return [line for line in output.read_text().splitlines() if line.startswith(begins)]


def tell(case: str, **outputs: Path) -> None:
    print(f"\n== {case}")
    for name, output in outputs.items():
        for line in ours(output):
            print(f"  {name}: {line}")


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], int]:
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*small(folder), *RUN, "steps=60", f"parallel.tensor={request.param}"]
    process = python(*command(arguments, request.param)[1:])
    assert process.returncode == 0, process.stderr
    return folder / "run", arguments, request.param


@pytest.mark.parametrize("apart", [0.0, 3.0])
@pytest.mark.parametrize("other", [[], ["optimizer.lr=5e-3", "seed=7"]], ids=["same", "other settings"])
def test_two_starts(straight: tuple[Path, list[str], int], tmp_path: Path, apart: float, other: list[str]) -> None:
    reference, arguments, ranks = straight
    run = tmp_path / "run"
    both = [[*arguments, f"run.dir={run}"], [*arguments, f"run.dir={run}", *other]]
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = [start(outputs[0], command(both[0], ranks))]
    time.sleep(apart)
    processes.append(start(outputs[1], command(both[1], ranks)))
    statuses = [process.wait(PATIENCE) for process in processes]
    tell(
        f"{ranks} rank(s), {apart:.0f} s apart, second with {other or 'the same settings'}",
        first=outputs[0],
        second=outputs[1],
    )
    winner = statuses.index(0)
    if sorted(map(bool, statuses)) == [False, False]:
        pytest.skip("the first had ended before the second began")
    loser = 1 - winner
    assert statuses[loser] == (2 if ranks == 1 else 1)  # torchrun's own is always 1
    assert_names(outputs[loser].read_text().splitlines(), run)
    if winner == 0 or not other:
        assert_undisturbed(run, reference)


def test_after_a_kill(straight: tuple[Path, list[str], int], tmp_path: Path) -> None:
    reference, arguments, ranks = straight
    run = tmp_path / "run"
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = [*arguments, f"run.dir={run}"]
    process = start(first, command(arguments, ranks))
    wait_until((run / "checkpoints" / "step-20").is_dir)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if ranks == 2 else []
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert start(second, command(arguments, ranks)).wait(PATIENCE) == 0
    tell(f"{ranks} rank(s), the second after SIGKILL of the first", first=first, second=second)
    assert_undisturbed(run, reference)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("kernels", [1, 2])
@pytest.mark.parametrize("killed", [False, True])
def test_on_two_hosts(straight: tuple[Path, list[str], int], tmp_path: Path, kernels: int, killed: bool) -> None:
    """With two kernels the locks of one do not reach the other: a mount puts another kernel's name in the second host's
    /proc, and flock fails there; what is left is the heartbeat."""
    reference, arguments, ranks = straight
    run = tmp_path / "run"
    arguments = [*arguments, f"run.dir={run}"]
    outputs = {"first": tmp_path / "first", "second": tmp_path / "second"}
    (tmp_path / "kernel").write_text("another-kernel\n")
    theirs = command(arguments, ranks)
    with two_hosts() as (first, second):
        process = first.start(command(arguments, ranks), outputs["first"])
        wait_until((run / "checkpoints" / "step-10").is_dir)
        if killed:
            first.kill()
        else:
            for pid in first.processes():
                os.kill(pid, signal.SIGSTOP if kernels == 1 else signal.SIGCONT)
        if kernels == 2:
            from faults import faults

            mount = f'mount --bind {tmp_path / "kernel"} {KERNEL} && exec "$@"'
            env = " ".join(f"{name}='{value}'" for name, value in faults("flock ENOSYS */lock").items())
            theirs = ["unshare", "--mount", "sh", "-c", f"export {env}; {mount}", "sh", *theirs]
        status = second.start(theirs, outputs["second"]).wait(PATIENCE)
        for pid in first.processes():
            os.kill(pid, signal.SIGCONT)
        tell(f"two hosts, {kernels} kernel(s), {ranks} rank(s), first {'killed' if killed else 'alive'}", **outputs)
        if killed:
            assert status == 0
        else:
            assert status == (2 if ranks == 1 else 1)
            assert_names(outputs["second"].read_text().splitlines(), run)
            assert "on nodeA" in outputs["second"].read_text()
            assert process.wait(PATIENCE) == 0
    assert_undisturbed(run, reference)
    shutil.rmtree(run)
