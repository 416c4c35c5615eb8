"""A checkpoint of 64 ranks: a rank of any layout opens the few files that it needs once, and finds its elements by
bisection. The checkpoint is made up by the benchmark, and its values are the positions of the elements."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import Layout, run_for
from safetensors.numpy import load_file, save_file

from opt_parallel.benchmarks.resuming import fragments_of, make, shards_of
from opt_parallel.checkpoint import reader as reading
from opt_parallel.checkpoint.fragments import TABLES, Fragments
from opt_parallel.checkpoint.manifest import read_manifest
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.stored import StoredFile
from opt_parallel.zero import Fragment

RUN = run_for(Layout(tensor=4, stage=3))
KINDS = ("weights", "exp_avg", "exp_avg_sq")
PADDING = -1.0


def part_of(shape: tuple[int, ...], dim: int, part: int, parts: int) -> np.ndarray:
    """The positions of a part's elements in the flattened full tensor."""
    positions = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    missing = [(0, -size % parts if number == dim else 0) for number, size in enumerate(shape)]
    return np.split(np.pad(positions, missing, constant_values=PADDING), parts, axis=dim)[part].reshape(-1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by tensor 4 × data 16."""
    folder = tmp_path_factory.mktemp("saved")
    make(folder, RUN, 4, 16)
    tensors = read_manifest(folder)["tensors"]
    names = sorted(tensors)
    for file, table in load_file(folder / TABLES).items():
        values = {}
        for number, part, start, count in table:
            tensor = tensors[names[number]]
            positions = part_of(tuple(tensor["shape"]), tensor["dim"], part, tensor["parts"])[start : start + count]
            values |= {f"{kind}/{names[number]}": positions + of_kind for of_kind, kind in enumerate(KINDS)}
        save_file(values, folder / file)
    return folder


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened, how often the tables were read, and how often the rectangles of a fragment were
    computed, which a rank does for its own and for the stored fragments that it examines."""
    done: Counter[str] = Counter()

    def counted(of: Any, method: str, what: Any) -> None:
        original = getattr(of, method)

        def replaced(*arguments: Any) -> Any:
            done[what(*arguments)] += 1
            return original(*arguments)

        monkeypatch.setattr(of, method, replaced)

    counted(StoredFile, "__enter__", lambda file: file.path.name)
    counted(reading, "boxes_of", lambda *_: "rectangles")
    counted(Fragments, "__init__", lambda *_: "tables")
    return done


def empty(count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weights and the moments of a fragment."""
    weights, *moments = (torch.full((count,), PADDING) for _ in KINDS)
    return weights, dict(zip(KINDS[1:], moments, strict=True))


# Most files that a rank opens, and most stored fragments that it examines for each of its own.
@pytest.mark.parametrize(
    ("tensor", "data", "files", "examined"), [(4, 16, 2, 1.1), (2, 32, 6, 1.5), (1, 64, 8, 1.7), (4, 3, 12, 6.5)]
)
def test_a_rank_opens_the_files_of_its_fragments_once(
    saved: Path, work: Counter[str], tensor: int, data: int, files: int, examined: float
) -> None:
    shards = shards_of(RUN, tensor)
    for tensor_rank, data_rank in ((0, 0), (tensor - 1, data // 2), (tensor // 2, data - 1)):
        own = [
            Fragment(name, shard, start, *empty(count))
            for name, shard, start, count in fragments_of(shards, tensor_rank, data_rank, data)
        ]
        work.clear()
        CheckpointReader(saved).restore(own)
        for each in own:
            wanted = part_of(each.shard.shape, each.shard.dim, each.shard.index, each.shard.count)
            wanted = wanted[each.start : each.start + len(each.weights)]
            for number, values in enumerate(each.tensors.values()):
                assert np.array_equal(values.numpy()[wanted != PADDING], wanted[wanted != PADDING] + number), each.name
        assert work.pop("tables") == 1
        assert work.pop("rectangles") - len(own) <= examined * len(own)
        assert len(work) <= files
        assert set(work.values()) == {1}
