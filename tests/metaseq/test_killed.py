"""An export of Meta's files that is killed leaves no folder under its name, and the same command then completes it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import python, start
from metaseq_forms import Size, weights_of, write
from safetensors.torch import load_file

from opt_parallel.storage.atomic import HELD

SIZE = Size(layers=4, hidden=256, heads=4, ffn=1024, rows=2048, positions=64)  # 4 MB
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the folder exists": lambda partial: (partial / HELD).exists(),
    "a file of weights exists": lambda partial: len(list(partial.glob("*.safetensors"))) > 0,
    "half of the weights are written": lambda partial: len(list(partial.glob("*.safetensors"))) > 20,
    "all weights are written": lambda partial: (partial / "checksums.json").exists(),
    "everything is written": lambda partial: (partial / "config.json").exists(),
}
DEFAULT = "half of the weights are written"


@pytest.mark.parametrize(
    "moment", [pytest.param(each, marks=[] if each == DEFAULT else pytest.mark.long) for each in MOMENTS]
)
def test_an_export_that_is_killed_starts_anew(moment: str, tmp_path: Path) -> None:
    weights = weights_of(SIZE)
    write("raw", tmp_path / "raw", SIZE, weights, parts=2, shards=3)
    place = tmp_path / "place"
    place.mkdir()
    command = ("scripts/export.py", "--checkpoint", str(tmp_path / "raw"), "--output", str(place / "hf"),
               "--max-shard-size", "100kB")  # fmt: skip
    process, end = start(tmp_path / "said", *command), time.monotonic() + 240
    while not any(MOMENTS[moment](partial) for partial in place.glob("hf.*.partial")):
        assert time.monotonic() < end, (tmp_path / "said").read_text()
    os.kill(process.pid, signal.SIGKILL)
    assert process.ended_within(60)
    (left,) = place.iterdir()
    assert left.name.endswith(".partial")
    again = python(*command)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in place.iterdir()] == ["hf"]
    files = sorted((place / "hf").glob("*.safetensors"))
    found = {name: values for path in files for name, values in load_file(path).items()}
    assert len(files) > 20
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], values) for name, values in weights.items())
