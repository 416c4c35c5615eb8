"""A run that exports itself: once, at its very end, and again where that went wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from command import launch, python, small


def steps_of(export: Path) -> str:
    """What the model card says."""
    lines = (export / "README.md").read_text().splitlines()
    return next(line for line in lines if line.startswith("| steps |"))


@pytest.mark.long
def test_ranks_end_while_the_first_exports(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    arguments = [*small(tmp_path), "parallel.tensor=2", "steps=2", f"data.validation={text}", "evaluation.every=1"]
    process = launch(2, "train.py", *arguments, "export.at_end=true", "export.dtype=bfloat16")
    assert process.returncode == 0, process.stderr
    export = tmp_path / "run" / "export"
    assert process.stdout.splitlines()[-1] == f"exported {tmp_path}/run/checkpoints/step-2 to {export}"
    assert steps_of(export) == "| steps | 2 of 2 |"
    assert "validation loss, nats per token, step 2" in (export / "README.md").read_text()
    assert '"torch_dtype": "bfloat16"' in (export / "config.json").read_text()


@pytest.mark.long
def test_a_run_that_could_not_export_does_it_when_started_again(tmp_path: Path) -> None:
    arguments = [*small(tmp_path), "steps=2", "export.at_end=true"]
    export, checkpoint = tmp_path / "run" / "export", tmp_path / "run" / "checkpoints" / "step-2"
    assert python("train.py", *arguments, "stop_at=1").returncode == 0
    assert not export.exists()  # the run goes on

    export.write_text("a file where a folder is to be made")
    failed = python("train.py", *arguments)
    assert failed.returncode == 2
    assert f"export.at_end: {export} exists and was not written by an export" in failed.stderr
    assert f"{checkpoint} is complete, and the same command exports it again" in failed.stderr
    assert export.read_text() == "a file where a folder is to be made"
    export.unlink()
    (tmp_path / "run" / "export.partial").mkdir()  # left behind by a killed one: it blocks nothing
    (export / "mine").mkdir(parents=True)
    foreign = python("train.py", *arguments)
    assert foreign.returncode == 2
    assert "was not written by an export" in foreign.stderr
    (export / "mine").rmdir()  # still there
    export.rmdir()
    again = python("train.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == f"exported {checkpoint} to {export}"
    third = python("train.py", *arguments, "export.dtype=bfloat16").stdout
    assert third.splitlines()[-1] == f"{export} already holds {checkpoint.name}: remove the folder to export again"
    assert '"torch_dtype": "float32"' in (export / "config.json").read_text()

    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "export" / "config.json", (0, 0))  # no file's time says anything
    copied = python("train.py", *arguments, f"run.dir={tmp_path / 'copy'}").stdout
    assert f"already holds {checkpoint.name}" in copied
    longer = python("train.py", *arguments, "steps=3", "export.at_end=false")
    assert longer.returncode == 0, longer.stderr
    later = time.time() + 1000
    os.utime(export / "config.json", (later, later))  # an older checkpoint's, by whatever clock
    longer = python("train.py", *arguments, "steps=3")
    assert longer.returncode == 0, longer.stderr
    assert steps_of(export) == "| steps | 3 of 3 |"
    assert sorted(path.name for path in export.parent.glob("export*")) == ["export"]
    assert json.loads((export / "checkpoint.json").read_text())["step"] == 3
