"""Ends runs by each signal, under each launcher, on each kind of terminal.

Each run must save a checkpoint, write its state, and resume with the same losses as a run without an interruption.

    PYTHONPATH=.:tests/support python tests/support/signals.py    # the full table, half an hour or more
    PYTHONPATH=.:tests/support python tests/support/signals.py --launchers python --signals HUP QUIT

A signal is sent to the process group, as a terminal does, so `tee` and torchrun get the signal too. torchrun's ranks do
not get the signal, because each rank has its own session. Plain torchrun does not forward SIGUSR1 and SIGKILL, so the
ranks must notice that torchrun has ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pty
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from command import ROOT, environment, launch, small, train_rows

from opt_parallel.checkpoint.folders import newest, step_of
from opt_parallel.runtime.log import aligned

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {"python": [sys.executable], "torchrun": TORCHRUN, "nohup torchrun": ["nohup", *TORCHRUN]}
TERMINALS = ("terminal", "| tee", "| head", "closed terminal")
SIGNALS = ("INT", "TERM", "HUP", "QUIT", "USR1", "KILL")  # KILL is only sent to launchers
CELLS = [
    (launcher, terminal, name)
    for launcher in LAUNCHERS
    for terminal in TERMINALS
    for name in SIGNALS
    if (launcher, name) != ("python", "KILL")
]
ROWS, LENGTH, LONGER = 8, 2000, 3  # Losses before the signal, steps of a run, and steps after resuming.
STRAIGHT = 20  # The number of steps of an uninterrupted run is a multiple of this number, so that cells share runs.
TIMEOUT = 600.0
MARK = "OPT_PARALLEL_TEST_RUN"  # The environment variable that all processes of a run inherit.


@dataclass(frozen=True)
class Cell:
    """The result of one interrupted run.

    `losses` is true if all losses, also after resuming, equal those of the uninterrupted run. `left` is the number of
    processes that did not end."""

    launcher: str
    terminal: str
    signal: str
    status: int
    state: str
    rows: int
    checkpoint: int | None
    losses: str
    left: int

    @property
    def right(self) -> bool:
        """Whether the result is correct. The exit status counts only for plain Python."""
        alone = self.launcher != "python" or self.status == (130 if self.signal == "INT" else 75)
        saved = self.state == "stopped" and self.checkpoint == self.rows and self.losses == "the same"
        return alone and saved and not self.left


class Running:
    """A run in its own process group, and the terminal or pipe that gets its output."""

    def __init__(self, command: list[str], terminal: str, hangs_up: bool, folder: Path) -> None:
        """Start a run. If `hangs_up`, the terminal controls the process group, so closing the terminal sends SIGHUP.

        Without `hangs_up`, the terminal only gets the output."""
        self.reader: subprocess.Popen[bytes] | None = None
        self.master: int | None = None
        self.name = folder.name
        env = environment(**{MARK: self.name})
        folder.mkdir(exist_ok=True)
        if terminal in ("terminal", "closed terminal"):
            if hangs_up or terminal == "terminal":
                self.pid, self.master = pty.fork()
                if self.pid == 0:
                    os.chdir(folder)  # nohup writes nohup.out to this folder
                    os.execvpe(command[0], command, env)
            else:
                self.master, other = pty.openpty()
                process = subprocess.Popen(
                    command, cwd=folder, env=env, stdout=other, stderr=other, stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
                os.close(other)
                self.pid, self._process = process.pid, process
            self._closing = threading.Event()
            self._reading = threading.Thread(target=self._read, args=(self.master,), daemon=True)
            self._reading.start()
            return
        with (folder / "stderr.txt").open("wb") as errors:
            process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                process_group=0,
            )  # fmt: skip
        self.pid, self._process = process.pid, process
        words = ["tee", str(folder / "tee.txt")] if terminal == "| tee" else ["head", "-n", "1"]
        assert process.stdout is not None
        self.reader = subprocess.Popen(
            words, stdin=process.stdout, stdout=subprocess.DEVNULL, process_group=process.pid
        )
        process.stdout.close()

    def _read(self, master: int) -> None:
        with suppress(OSError):  # EIO means that the terminal is closed
            while not self._closing.is_set():
                if select.select([master], [], [], 0.1)[0]:
                    os.read(master, 4096)

    def close_terminal(self) -> None:
        assert self.master is not None
        self._closing.set()
        self._reading.join()  # because a terminal stays open while it is read
        os.close(self.master)
        self.master = None

    def send(self, name: str) -> None:
        """Send a signal, by the key of the terminal if the terminal has a key for this signal."""
        keys = {"INT": b"\x03", "QUIT": b"\x1c"}
        if self.master is not None and name in keys:
            os.write(self.master, keys[name])
        else:
            os.killpg(self.pid, getattr(signal, f"SIG{name}"))

    def end(self) -> tuple[int, int]:
        """Wait for all processes to end. Return the exit status and the number of processes that had to be killed."""
        _, status = os.waitpid(self.pid, 0)
        if self.master is not None:
            self.close_terminal()
        if self.reader is not None:
            self.reader.wait()
        deadline = time.monotonic() + TIMEOUT
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(status), len(left)

    def processes(self, word: str = "") -> list[int]:
        """The processes of the run whose command contains `word`, in any process group and with any parent."""
        mark, found = f"{MARK}={self.name}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has ended
                marked = mark in (folder / "environ").read_bytes().split(b"\0")
                if marked and word.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def wait_until(self, holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not holds():
            assert time.monotonic() < deadline, f"{self.name}: not within {TIMEOUT} s"
            time.sleep(0.02)


def trains(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= ROWS


def losses_in(run: Path) -> list[float]:
    return [row["loss"] for row in train_rows(run)]


def straight(folder: Path, processes: int, steps: int) -> list[float]:
    """The losses of the first steps of an uninterrupted run."""
    rounded = math.ceil(steps / STRAIGHT) * STRAIGHT
    run = folder / f"straight-{processes}-{rounded}"
    if not (run / "metrics.jsonl").exists():
        done = launch(processes, "train.py", *arguments(folder, run), f"stop_at={rounded}")
        assert done.returncode == 0, done.stderr
    return losses_in(run)[:steps]


def arguments(folder: Path, run: Path) -> list[str]:
    return [*small(folder), f"steps={LENGTH}", f"run.dir={run}"]


def end_one(folder: Path, launcher: str, terminal: str, name: str) -> Cell:
    """End one run by a signal, and resume it."""
    run = folder / "-".join(f"{launcher}{terminal}{name}".split()).replace("|", "-")
    command = [*LAUNCHERS[launcher], str(ROOT / "train.py"), *arguments(folder, run)]
    running = Running(command, terminal, hangs_up=name == "HUP", folder=folder / f"{run.name}-output")
    running.wait_until(lambda: trains(run))
    if terminal == "closed terminal":
        running.close_terminal()
        time.sleep(0.3)  # lets the run make some steps without a terminal
    if not (terminal == "closed terminal" and name == "HUP"):  # closing the terminal has already sent SIGHUP
        running.send(name)
    status, left = running.end()
    rows, last = len(losses_in(run)), newest(run / "checkpoints")
    processes = 1 if launcher == "python" else 2
    state = (run / "state").read_text().strip()
    again = launch(processes, "train.py", *arguments(folder, run), f"stop_at={rows + LONGER}")
    same = again.returncode == 0 and losses_in(run) == straight(folder, processes, rows + LONGER)
    losses = "the same" if same else "others"
    return Cell(launcher, terminal, name, status, state, rows, last and step_of(last), losses, left)


def end_with_children(folder: Path, launcher: str, name: str, stream: bool) -> tuple[str, int, int]:
    """End a run while its child processes prepare its text or fill its stream.

    The result is the state of the run, the number of child processes, and the number of processes that did not end."""
    words, texts = random.Random(0), folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for file in range(4):  # two processes share these files of 10 MB
            rows = ({"text": " ".join(f"{words.getrandbits(32):x}" for _ in range(200))} for _ in range(5500))
            (texts / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "-".join(f"{launcher} {name} {'stream' if stream else 'prepare'}".split())
    train = f"[{{path: {texts}, stream: true}}]" if stream else f"{texts}/*.jsonl"
    more = [f"data.train={train}", f"data.cache={run}-cache", "data.workers=2", "steps=1000000"]
    command = [*LAUNCHERS[launcher], str(ROOT / "train.py"), *arguments(folder, run), *more]
    running = Running(command, "| tee", hangs_up=False, folder=Path(f"{run}-output"))
    running.wait_until(lambda: trains(run) if stream else len(running.processes("spawn_main")) > 1)
    children = len(running.processes("spawn_main"))
    running.send(name)
    _, left = running.end()
    return (run / "state").read_text().strip(), children, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--terminals", nargs="+", choices=TERMINALS, default=list(TERMINALS))
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    chosen = parser.parse_args()
    # A shell may have started this program in the background or under nohup, with these signals ignored.
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_DFL)
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for launcher, terminal, name in CELLS:
            if launcher in chosen.launchers and terminal in chosen.terminals and name in chosen.signals:
                cells.append(end_one(Path(folder), launcher, terminal, name))
                print(json.dumps(cells[-1].__dict__ | {"right": cells[-1].right}), file=sys.stderr, flush=True)
    names = [field.name for field in fields(Cell)]
    print(aligned([[*names, ""], *([*(str(getattr(cell, name)) for name in names), "" if cell.right else "WRONG"]
                                   for cell in cells)]))  # fmt: skip
    return 0 if all(cell.right for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
