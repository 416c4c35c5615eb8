"""Two starts in one run's folder, of one and of two ranks, on one host and on two: a table of what each printed.

    python -m pytest --long -s -n 0 tests/launching/test_two_starts.py

The first waits after its save of step 10, alive, until the second has ended; then it finishes.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command import ROOT, environment, python, small
from faults import faults, why_not
from hosts import Host, two_hosts
from hosts import why_not as why_no_hosts
from two_starts import RUN, assert_names, assert_undisturbed

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMEOUT = 300.0
KERNEL = "/proc/sys/kernel/random/boot_id"
OTHER = ["optimizer.lr=5e-3", "seed=7"]


@dataclass(frozen=True)
class Cell:
    """`apart`: seconds between the first's first row and the second's start; None: at once. `kernels`: 2 where the
    locks of one host do not reach the other; then the heartbeat decides."""

    ranks: int
    apart: float | None = 3.0
    other: bool = False
    killed: bool = False
    hosts: int = 1
    kernels: int = 1

    def __str__(self) -> str:
        when = "after SIGKILL of the first" if self.killed else "at once" if self.apart is None else "3 s apart"
        where = "" if self.hosts == 1 else f", two hosts, {self.kernels} kernel{'s' * (self.kernels > 1)}"
        settings = ", other settings" if self.other else ""
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {when}{settings}{where}"


CELLS = [
    cell
    for ranks in (1, 2)
    for cell in [
        *(Cell(ranks, apart, other) for apart, other in itertools.product((None, 3.0), (False, True))),
        Cell(ranks, killed=True),
        *(
            Cell(ranks, killed=killed, hosts=2, kernels=kernels)
            for kernels, killed in itertools.product((1, 2), (False, True))
        ),
    ]
]
needs_hosts = pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))


@dataclass
class Here:
    """This host, as `Host` is one of two."""

    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str], output: Path, **env: str) -> subprocess.Popen[bytes]:
        with output.open("ab") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(**env), stdout=file, stderr=file)
        self.started.append(process)
        return process

    def kill(self) -> None:
        """SIGKILL to all that was started, and to the ranks of a launcher."""
        for process in self.started:
            if process.poll() is None:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in (process.pid, *map(int, children)):
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def places(number: int) -> Iterator[tuple[Here | Host, Here | Host]]:
    """Where the first and the second start run; nothing of them is left."""
    if number == 2:
        with two_hosts() as hosts:
            yield hosts
        return
    both = Here(), Here()
    try:
        yield both
    finally:
        for place in both:
            place.kill()


def command(arguments: list[str], ranks: int) -> list[str]:
    return [sys.executable, *(LAUNCHER if ranks == 2 else []), "train.py", *arguments]


def on_another_kernel(command: list[str], folder: Path) -> list[str]:
    """A mount puts another kernel's name into its /proc, and its locks fail."""
    name = folder / "kernel"
    name.write_text("another-kernel\n")
    env = " ".join(f"{key}='{value}'" for key, value in faults("flock ENOSYS */lock").items())
    script = f'export {env}; mount --bind {name} {KERNEL} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", *command]


def wait_until(happened: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    """Or until one of the processes has ended."""
    deadline = time.monotonic() + TIMEOUT
    while not happened() and all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def said(output: Path) -> list[str]:
    """What the run said: less torchrun's own report."""
    begins = ("error: ", "warning: ", "starting", "continuing", "finished", "stopped", "/")
    return [line for line in output.read_text().splitlines() if line.startswith(begins)]


def files_of(run: Path) -> dict[str, tuple[int, int]]:
    """All but the lock, which beats."""
    found = {str(path.relative_to(run)): path.stat() for path in run.rglob("*") if path.name != "lock"}
    return {path: (status.st_mtime_ns, status.st_size) for path, status in found.items()}


@pytest.fixture(scope="module")
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*small(folder), *RUN, f"parallel.tensor={request.param}"]
    process = python(*command(arguments, request.param)[1:])
    assert process.returncode == 0, process.stderr
    return folder / "run", arguments


def marks_of(cell: Cell) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] + [needs_hosts] * (cell.hosts == 2)


@pytest.mark.parametrize(
    ("straight", "cell"),
    [pytest.param(cell.ranks, cell, id=str(cell), marks=marks_of(cell)) for cell in CELLS],
    indirect=["straight"],
)
def test_two_starts(straight: tuple[Path, list[str]], tmp_path: Path, cell: Cell) -> None:
    reference, arguments = straight
    run, waited_at, released = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-10", tmp_path / "released"
    waits = faults(f"write HANG {run}/metrics.jsonl", when=waited_at / "manifest.json", until=released)
    ours = command([*arguments, f"run.dir={run}"], cell.ranks)
    theirs = [*ours, *(OTHER if cell.other else [])]
    if cell.kernels == 2:
        theirs = on_another_kernel(theirs, tmp_path)
    outputs = [tmp_path / "first", tmp_path / "second"]
    with places(cell.hosts) as (here, there):
        first = here.start(ours, outputs[0], **waits)
        if cell.apart is None:
            second = there.start(theirs, outputs[1], **waits)
            wait_until(lambda: False, first, second)
        else:
            wait_until(waited_at.is_dir, first)
            time.sleep(cell.apart)
            if cell.killed:
                here.kill()
                first.wait()
            before = files_of(run)
            second = there.start(theirs, outputs[1])
            second.wait(TIMEOUT)
            assert cell.killed or files_of(run) == before
        released.touch()
        statuses = first.wait(TIMEOUT), second.wait(TIMEOUT)
    print(f"\n== {cell} | status {statuses[0]}, {statuses[1]}")
    for name, output in zip(("first", "second"), outputs, strict=True):
        for line in said(output):
            print(f"   {name}: {line.replace(str(run), 'RUN')}")
    if cell.killed:
        assert statuses[1] == 0
    else:
        winner = 1 if cell.apart is None and statuses[0] else 0
        assert statuses[winner] == 0
        assert statuses[1 - winner] == (2 if cell.ranks == 1 else 1)  # torchrun's own is always 1
        assert_names(outputs[1 - winner].read_text().splitlines(), run)
        if cell.hosts == 2:
            assert "on nodeA" in outputs[1].read_text()
        if winner and cell.other:
            return  # it trained with the other settings, which no straight run did
    assert_undisturbed(run, reference)
