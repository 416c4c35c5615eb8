"""A run that exports itself: once, at its very end, and again where that went wrong."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import python, small, torchrun


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB: a run of opt-tiny and its export, less what a test puts there besides."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def steps_of(export: Path) -> str:
    """What the model card says."""
    lines = (export / "README.md").read_text().splitlines()
    return next(line for line in lines if line.startswith("| steps |"))


def test_ranks_end_while_the_first_exports(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    arguments = [*small(tmp_path), "parallel.tensor=2", "steps=2", f"data.validation={text}", "evaluation.every=1"]
    process = torchrun(2, "train.py", *arguments, "export.at_end=true", "export.dtype=bfloat16")
    assert process.returncode == 0, process.stderr
    export = tmp_path / "run" / "export"
    assert process.stdout.splitlines()[-1] == f"exported {tmp_path}/run/checkpoints/step-2 to {export}"
    assert steps_of(export) == "| steps | 2 of 2 |"
    assert "validation loss, nats a token, step 2" in (export / "README.md").read_text()
    assert '"torch_dtype": "bfloat16"' in (export / "config.json").read_text()


def test_a_run_that_could_not_export_does_it_when_started_again(disk: Path, tmp_path: Path) -> None:
    arguments = [*small(tmp_path), f"run.dir={disk / 'run'}", "steps=3", "export.at_end=true"]
    export, checkpoint = disk / "run" / "export", disk / "run" / "checkpoints" / "step-3"
    assert python("train.py", *arguments, "stop_at=2").returncode == 0
    assert not export.exists()  # the run goes on

    assert python("train.py", *arguments, "export.at_end=false").returncode == 0
    assert not export.exists()
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(free - 100_000))
    full = python("train.py", *arguments)
    assert full.returncode == 2
    assert full.stderr == (
        f"error: export.at_end: {export} cannot be written (No space left on device), and nothing of it is left: make "
        f"room, or choose another; {checkpoint} is safe, and the same command tries the export again\n"
    )
    (disk / "filler").unlink()
    again = python("train.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == f"exported {checkpoint} to {export}"
    assert "exported" not in python("train.py", *arguments).stdout  # it is there

    longer = python("train.py", *arguments, "steps=4")
    assert longer.returncode == 0, longer.stderr
    assert steps_of(export) == "| steps | 4 of 4 |"
    assert sorted(path.name for path in export.parent.glob("export*")) == ["export"]
