"""A changed manifest, or files that are not what it says, are damage: named, set aside, the checkpoint before taken."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from layouts import Layout
from test_resume import go, run_of, with_tokenizer

from opt_parallel.config import Run

NAME = "decoder.final_layer_norm.weight"
FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
ALL_KINDS = ["weights", "exp_avg", "exp_avg_sq"]


def spread(folder: Path, layout: Layout) -> Run:
    return run_of(folder, layout, 6, model={"num_hidden_layers": 1, "vocab_size": 101})


@pytest.fixture(scope="module")
def saved(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks at tensor 2, saved at steps 2 and 4."""
    folder = with_tokenizer(tmp_path_factory.mktemp("saved") / "run")
    crew(2)(go, spread(folder, Layout(tensor=2, stage=1)), 0, 4, (2, 4))
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def read_by_all(folder: Path) -> list[str]:
    """On the crew: what each way to read a run's checkpoint of step 4 makes of it: `damage` and what it says, or `read`
    and a digest of all that it would go on with."""
    from opt_parallel.checkpoint.damage import damage_in
    from opt_parallel.checkpoint.inspect import listed
    from opt_parallel.checkpoint.reading import open_checkpoint
    from opt_parallel.errors import UserError

    step = folder / "checkpoints" / "step-4"
    answers = [resumed(folder)]
    wrong = damage_in(step)
    answers.append(f"damage {wrong[0]}" if wrong else f"read {digest(step)}")
    try:
        open_checkpoint(step, checksums=True)
        answers.append(f"read {digest(step)}")
    except UserError as error:
        answers.append(f"damage {error}")
    assert [each.step for each in listed(folder)] == [2, 4]
    assert all("\n" not in answer for answer in answers)
    return answers


def resumed(folder: Path) -> str:
    """What `resume=auto` makes of it. What was set aside is put back."""
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.topology import Topology

    checkpoints, out = folder / "checkpoints", io.StringIO()
    run = spread(folder, Layout())
    with Topology.open(1) as topology, contextlib.redirect_stdout(out):
        store = Store(run, topology, folder / "tokenizer")
        reader = store.find()
        store.finish()
    assert reader is not None
    if reader.folder.name == "step-4":
        return f"read {digest(reader.folder)}"
    (aside,) = checkpoints.glob("step-4.damaged*")
    line = out.getvalue().rstrip("\n")
    assert line.startswith(f"warning: {checkpoints / 'step-4'}: ")
    assert line.endswith(f"it is set aside as {aside.name}")
    os.replace(aside, checkpoints / "step-4")
    return f"damage {line}"


def digest(folder: Path) -> str:
    """Of everything that a manifest says, read without our help."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return str(zlib.crc32(json.dumps(manifest | {"checksum": None}, sort_keys=True).encode()))


def count_verdicts(folder: Path, changes: list[tuple[int, int]]) -> Counter[str]:
    """On the crew: by what it came to, how many of the `changes`, each of one byte of the manifest."""
    path = folder / "checkpoints" / "step-4" / "manifest.json"
    content, before, counts = path.read_bytes(), digest(path.parent), Counter[str]()
    for position, value in changes:
        path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
        try:
            answers = read_by_all(folder)
        except Exception as error:
            counts[f"{type(error).__name__}: {error} at {position}, {value}"] += 1
            for aside in path.parent.parent.glob("step-4.damaged*"):
                os.replace(aside, path.parent)
            continue
        if all(answer.startswith("damage ") for answer in answers):
            counts["set aside"] += 1
        elif all(answer == f"read {before}" for answer in answers):
            counts["no effect"] += 1
        else:
            counts[f"silent: {answers} at {position}, {value}"] += 1
    path.write_bytes(content)
    return counts


def test_flipped_bits_and_changed_digits_of_a_manifest(crew: Any, run: Path, request: pytest.FixtureRequest) -> None:
    """None is silent, none a traceback."""
    flips, digits = (1000, 500) if request.config.getoption("long") else (40, 20)
    content, draw = (run / "checkpoints" / "step-4" / "manifest.json").read_bytes(), random.Random(14)
    changes = []
    for _ in range(flips):
        position = draw.randrange(len(content))
        changes.append((position, content[position] ^ 1 << draw.randrange(8)))
    places = [position for position, byte in enumerate(content) if byte in b"0123456789"]
    for position in draw.choices(places, k=digits):
        changes.append((position, draw.choice([byte for byte in b"0123456789" if byte != content[position]])))
    (counts,) = crew(1)(count_verdicts, run, changes)
    print(dict(counts))
    assert counts.keys() <= {"set aside", "no effect"}
    assert counts["set aside"] > 0.95 * len(changes)
