"""A rank's memory exceeds its part of the model by at most a layer, whatever the form of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import cold_python
from metaseq_forms import FORMS, Size, weights_of, write

SIZE = Size(layers=6, hidden=1024, heads=16, ffn=4096, rows=8192, positions=256)
DEGREES = (1, 2, 4)
WORK = 2 << 20  # bytes for Python's objects
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # Freed memory goes back to the system.
# For each form, degree and rank, a fork of this process reads its part, so that no peak is that of another rank.
READING = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from memory import forget_peak, peak_memory
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.shard import fill, marked
from opt_parallel.parallel.topology import Group

def filled(opened, rank, degree):
    with torch.device("meta"):
        model = CausalLM(opened.config, Group(None, rank, degree))
    fill(model, opened.weights, torch.device("cpu"), torch.float16)
    return model

def read(folder, rank, degree):
    opened = open_checkpoint(folder)
    filled(opened, 0, 16)  # The first use of a kernel maps its code, which counts as memory.
    opened.metaseq.bytes_read = 0
    forget_peak()
    before = peak_memory()
    model = filled(opened, rank, degree)
    held = {name: tensor.nbytes for name, tensor, _ in marked(model)}
    layer = sum(size for name, size in held.items() if ".layers.0." in name)
    return [peak_memory() - before, sum(held.values()), layer, opened.metaseq.bytes_read]

found = []
for folder in sys.argv[2:]:
    open_checkpoint(Path(folder))
    for degree in (1, 2, 4):
        for rank in range(degree):
            ours, theirs = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(theirs, json.dumps(read(Path(folder), rank, degree)).encode())
                os._exit(0)
            os.close(theirs)
            found.append([Path(folder).name, degree, rank, *json.loads(os.read(ours, 1000))])
            os.waitpid(child, 0)
            os.close(ours)
print(json.dumps(found))
"""


def measured(folder: Path, forms: tuple[str, ...]) -> list[Any]:
    """For each form, degree and rank: bytes of the growth of memory, of the rank's part, of a layer in it, and read."""
    for form in forms:
        write(form, folder / form, SIZE, weights_of(SIZE), parts=2, shards=3)
        if form in ("bare", "arrays"):
            (folder / form / "config.json").write_text('{"model_type": "opt", "num_attention_heads": 16}')
    support = str(Path(__file__).parents[1] / "support")
    done = cold_python("-c", READING, support, *(str(folder / form) for form in forms), timeout=900, **FREED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_a_rank_holds_its_part_and_a_layer(tmp_path: Path) -> None:
    found = measured(tmp_path, FORMS)
    assert len(found) == len(FORMS) * sum(DEGREES)
    for form, degree, rank, grown, part, layer, read in found:
        print(f"{form:10} tensor {degree} rank {rank}: {grown / 1e6:6.1f} MB, part {part / 1e6:6.1f}, layer "
              f"{layer / 1e6:5.1f}, over {(grown - part) / layer:.2f} layers, read {read / 1e6:.1f} MB")  # fmt: skip
    for form, degree, rank, grown, part, layer, _ in found:
        assert part < grown + WORK
        assert grown <= part + layer + WORK, (form, degree, rank)
