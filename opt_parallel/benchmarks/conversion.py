"""Measure the export of a checkpoint beside copying its files. Both take turns, on the same disk.

The export is on the disk when it ends, so the copy is measured with and without `sync`. The rates are bytes of the
checkpoint per second. Files are read from the cache of the system, or from the disk after the cache has forgotten them.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.runtime.log import bytes_in_words
from opt_parallel.tools.export import SHARD, export

HEAD = [
    "files", "copy", "copy and sync", "export", "its rate ÷ copy", "its rate ÷ copy and sync", "start of the command",
]  # fmt: skip


def measure(checkpoint: Path, folder: Path, rounds: int) -> list[list[str]]:
    """The table of medians and ranges, in seconds and as ratios of the two times in each round.

    Raises: UserError if `checkpoint` is no checkpoint."""
    open_checkpoint(str(checkpoint), "--checkpoint ")  # reports a mistake before anything is copied
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    size = bytes_in_words(sum(path.stat().st_size for path in files))
    lines = [HEAD]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Works(files, checkpoint, Path(temporary) / "out")
        work.export()  # The first export loads libraries.
        for what, prepare in (("in memory", _read), ("on disk", _forget)):
            times = [work.round(number, prepare) for number in range(rounds)]
            copy, synced, exported, command = ([each[name] for each in times] for name in Works.NAMES)
            start = [with_start - alone for with_start, alone in zip(command, exported, strict=True)]
            lines.append(
                [f"{size} {what}", _spread(copy, " s"), _spread(synced, " s"), _spread(exported, " s"),
                 _ratio(copy, exported), _ratio(synced, exported), _spread(start, " s")]
            )  # fmt: skip
    return lines


class Works:
    """The four works of a round. Each writes to `output`, which is removed after it."""

    NAMES = ("copy", "synced", "export", "command")

    def __init__(self, files: list[Path], checkpoint: Path, output: Path) -> None:
        self.files, self.checkpoint, self.output = files, checkpoint, output

    def round(self, number: int, prepare: Callable[[list[Path]], None]) -> dict[str, float]:
        """The seconds of each work, in an order that changes from round to round."""
        turn = number % len(self.NAMES)
        return {name: self._timed(name, prepare) for name in (*self.NAMES[turn:], *self.NAMES[:turn])}

    def copy(self) -> None:
        self.output.mkdir()
        subprocess.run(["cp", *self.files, self.output], check=True)

    def synced(self) -> None:
        self.copy()
        subprocess.run(["sync", *self.output.iterdir(), self.output], check=True)

    def export(self) -> None:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            export(self.checkpoint, self.output, SHARD, ExportDtype.auto)

    def command(self) -> None:
        arguments = ("--checkpoint", self.checkpoint, "--output", self.output)
        subprocess.run([sys.executable, "-m", "opt_parallel", "export", *arguments], check=True, capture_output=True)

    def _timed(self, name: str, prepare: Callable[[list[Path]], None]) -> float:
        shutil.rmtree(self.output, ignore_errors=True)
        prepare(self.files)
        start = time.perf_counter()
        getattr(self, name)()
        return time.perf_counter() - start


def _read(files: list[Path]) -> None:
    """Read the files into the cache of the system."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _forget(files: list[Path]) -> None:
    """Remove the files from the cache of the system."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _ratio(copy: list[float], exported: list[float]) -> str:
    return _spread([a / b for a, b in zip(copy, exported, strict=True)])


def _spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f}–{max(values):.2f})"
