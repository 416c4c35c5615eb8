"""Kills a run repeatedly while it saves. Each start must find a complete checkpoint, and resume with the same losses.

    PYTHONPATH=.:tests/support python tests/support/kill_saves.py --kills 30 --seed 0

A run of two processes saves after every step. In each start, SIGKILL is sent to one rank, or to all ranks and the
launcher, at a random time after a checkpoint's temporary folder appears. With `--every 2`, there is time between saves.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from command import ROOT, environment, small, train_rows

from opt_parallel.checkpoint.damage import damage_in
from opt_parallel.checkpoint.folders import steps_in

TIMEOUT = 240.0  # Maximum seconds for one start.
# A checkpoint has 116 MB. A save takes as long as a few steps, so the run is saving most of the time.
LARGE = [
    "model.hidden_size=512", "model.ffn_dim=2048", "model.num_hidden_layers=3", "model.vocab_size=301",
    "model.layerdrop=0.2", "zero.stage=1",
]  # fmt: skip
STALE = "stale"  # This file marks the folders that a killed save has left. No checkpoint may contain it.
LAYOUTS = {"t2": ["parallel.tensor=2"], "d2": ["parallel.tensor=1"]}


@dataclass
class Tally:
    """Statistics of the kills: the killed processes, and the state of the interrupted saves."""

    whom: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    resumed_at: list[int] = field(default_factory=list)  # the steps at which the starts resumed


class Start:
    """One start of the run, which consists of a launcher and two ranks."""

    def __init__(self, arguments: list[str]) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*launcher, "train.py", *arguments], cwd=ROOT, env=environment(), stdout=self.output, stderr=self.output
        )
        self.since = time.monotonic()

    @property
    def running(self) -> bool:
        assert time.monotonic() - self.since < TIMEOUT, f"the run hangs:\n{self.text()}"
        return self.process.poll() is None

    def ranks(self) -> list[int]:
        """The processes of the ranks, which have their own sessions and may outlive their launcher."""
        try:
            return list(
                map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())
            )
        except FileNotFoundError:
            return []

    def kill(self, victim: int | None) -> None:
        """Send SIGKILL to the rank `victim`, or to all ranks and the launcher if `victim` is None.

        The launcher must end the other rank after one rank was killed."""
        if victim is not None:
            os.kill(self.ranks()[victim], signal.SIGKILL)
            while self.running:
                time.sleep(0.02)
        self.end()

    def end(self) -> None:
        """Kill all remaining processes."""
        for process in self.ranks():
            os.kill(process, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        """The output of the start so far."""
        self.output.seek(0)
        return self.output.read()


def partials(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob("*.partial*") if not (folder / STALE).exists()]


def moment_of(checkpoints: Path) -> str:
    """A description of the state of the interrupted save."""
    for folder in partials(checkpoints):
        names = {path.name for path in folder.iterdir()}
        if "manifest.json" in names:
            return "the manifest written"
        if any(name.endswith(".json") for name in names) or "tokenizer" in names:
            return "a rank done"
        return "ranks writing" if names else "an empty folder"
    return "no save on its way"


def kill_during_save(start: Start, checkpoints: Path, draw: random.Random, tally: Tally) -> None:
    """Wait for a save, and kill processes of the run during this save. The run must not end before the save."""
    for folder in partials(checkpoints):
        (folder / STALE).touch()
    awaited, seen = draw.randrange(1, 4), set[Path]()
    victim, share = draw.choice((0, 1, None, None)), draw.uniform(0.0, 1.3)  # a share above 1 is a time after the save
    began, taken = time.monotonic(), 0.3
    while len(seen) < awaited:
        assert start.running, f"ended before it was killed:\n{start.text()}"
        for folder in set(partials(checkpoints)) - seen:
            taken = time.monotonic() - began if seen else taken  # the time between the starts of two saves
            began = time.monotonic()
            seen.add(folder)
        time.sleep(0.001)
    time.sleep(share * taken)
    start.kill(victim)
    tally.whom["all" if victim is None else "one rank"] += 1
    tally.moments[moment_of(checkpoints)] += 1


def complete_steps(checkpoints: Path) -> list[int]:
    """The steps with a checkpoint. The function asserts that each checkpoint is complete and undamaged."""
    for step in steps_in(checkpoints):
        damage = damage_in(checkpoints / f"step-{step}")
        assert not damage, f"step-{step}: {damage}"
        assert not (checkpoints / f"step-{step}" / STALE).exists()
    return steps_in(checkpoints)


def resumed_at(text: str) -> int:
    """The step at which a start resumed, which is read from its output."""
    for line in text.splitlines():
        if line.startswith("continuing at step "):
            return int(line.split()[3].rstrip(":"))
    assert "starting: " in text, text
    return 0


def kill_saves(folder: Path, kills: int, seed: int, layout: str = "t2", every: int = 1) -> Tally:
    """Kill a run `kills` times, let it finish, and compare its losses with those of an uninterrupted run.

    Raises: AssertionError."""
    draw, tally = random.Random(seed), Tally()
    steps = (4 * kills + 2) * every  # because at most three saves precede each kill
    common = [*small(folder), *LARGE, *LAYOUTS[layout], f"steps={steps}", f"checkpoint.every={every}"]
    finish([*common, f"run.dir={folder / 'straight'}", "checkpoint.every=0"])
    checkpoints = folder / "run" / "checkpoints"
    kept: list[int] = []
    for number in range(kills):
        start = Start(common)
        try:
            kill_during_save(start, checkpoints, draw, tally)
        finally:
            start.end()
        check_start(start.text(), kept, tally)
        before, kept = kept, complete_steps(checkpoints)
        assert not before or kept[-1:] >= before[-1:], f"the checkpoint of step {before[-1]} is lost"
        print(f"kill {number + 1}: {moment_of(checkpoints)}, complete: {kept}", flush=True)
    check_start(finish(common), kept, tally)
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{steps - every}", f"step-{steps}"]
    struck, straight = (
        [(row["step"], row["samples"], row["loss"]) for row in train_rows(folder / name)]
        for name in ("run", "straight")
    )
    assert struck == straight  # to the last bit: the layout is the same
    return tally


def finish(arguments: list[str]) -> str:
    """Run a start to its end, and return its output."""
    start = Start(arguments)
    try:
        while start.running:
            time.sleep(0.05)
        assert start.process.returncode == 0, start.text()
    finally:
        start.end()
    return start.text()


def check_start(text: str, kept: list[int], tally: Tally) -> None:
    """Assert that a start has found no damage, and has resumed at the newest checkpoint after the previous kill."""
    step = resumed_at(text)
    assert step == (kept[-1] if kept else 0), text
    assert "damaged" not in text, text
    tally.resumed_at.append(step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a run while it saves; see the file's first lines.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=LAYOUTS, default="t2")
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = kill_saves(Path(scratch), options.kills, options.seed, options.layout, options.every)
    print(f"killed {dict(result.whom)}; found {dict(result.moments)}; starts began at {result.resumed_at}")
