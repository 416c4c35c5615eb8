"""Makes token stores that contain given token ids, without text."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from opt_parallel.data.encode.columns import LENGTHS, Encoded, columns_of, ids_column
from opt_parallel.data.samples.batches import Feed
from opt_parallel.data.samples.mixture import Mixture, Source
from opt_parallel.data.samples.order import Shuffled
from opt_parallel.data.samples.samples import Rows
from opt_parallel.data.store.store import PartWriter, TokenStore, write_manifest


def store_of(folder: Path, parts: Sequence[Sequence[list[int]]], tokens: int = 1 << 16) -> TokenStore:
    """A token store with these lists of documents as its parts."""
    columns = {"ids": ids_column(tokens), "lengths": LENGTHS}
    written = []
    for number, documents in enumerate(parts):
        writer = PartWriter(folder / f"part-{number:05d}", columns)
        writer.write(Encoded(columns_of(list(documents))))
        written.append(writer.close())
    write_manifest(folder, columns, written, {})
    return TokenStore(folder)


def counting_rows(folder: Path, size: int, length: int) -> Rows:
    """Rows of consecutive numbers as token ids. Row i has the ids i·length to i·length + length.

    The parts of the token store end inside rows."""
    stream = list(range(size * length + 1))
    cuts = [0, len(stream) // 3, len(stream) // 3 + 1, len(stream)]
    return Rows(store_of(folder, [[stream[a:b]] for a, b in pairwise(cuts)], 1 << 20), length)


def feed_of(rows: Rows, seed: int, global_batch: int, micro_batch: int, data_rank: int = 0, data_size: int = 1) -> Feed:
    """The `Feed` of a run with one source of training data."""
    source = Source("train", Fraction(1), rows, Shuffled(seed, len(rows)))
    return Feed(Mixture([source]), global_batch, micro_batch, data_rank, data_size)


def ids_of(mixture: Mixture, data: int, micro: int, first: int, last: int, step: int = 16) -> dict[int, list[int]]:
    """The token ids by sample, of samples `first` to `last`, as the data ranks read them in steps of `step` samples."""
    found: dict[int, list[int]] = {}
    for start in range(first, last, step):
        for rank in range(data):
            for batch in Feed(mixture, step, micro, rank, data).at(start):
                found |= dict(zip(batch.samples.tolist(), batch.ids.tolist(), strict=True))
    return found
