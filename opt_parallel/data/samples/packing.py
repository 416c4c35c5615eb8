"""Cuts a token store into samples for fine-tuning.

A sample is a row with one padded example, or with several packed examples that do not attend to each other."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from opt_parallel.config.model import IGNORED
from opt_parallel.data.samples.samples import Sample
from opt_parallel.data.store.store import TokenStore

OPEN_ROWS = 256  # maximum number of rows with space for further examples; a further row closes the fullest row


class Examples:
    """The examples of a token store, in rows of at most `length` tokens.

    An example is in the same row in all epochs. The last token of an example is a target and never an input."""

    def __init__(self, store: TokenStore, length: int, packing: bool) -> None:
        self.store, self.length = store, length
        self.ends = store.ends
        lengths = np.diff(self.ends, prepend=0)
        self.firsts = self.ends - lengths
        rows = pack(lengths - 1, length) if packing else np.arange(len(lengths))
        self.examples = np.argsort(rows, kind="stable")  # the indices of the examples, sorted by row
        self.cuts = np.concatenate([[0], np.cumsum(np.bincount(rows))])

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def sample(self, number: int) -> Sample:
        numbers = self.examples[self.cuts[number] : self.cuts[number + 1]]
        inputs, labels = zip(*(self._example(int(example)) for example in numbers), strict=True)
        return Sample(
            np.concatenate(inputs),
            np.concatenate(labels),
            np.concatenate([np.full(len(ids), segment) for segment, ids in enumerate(inputs, start=1)]),
            np.concatenate([np.arange(len(ids)) for ids in inputs]),
        )

    def _example(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        span = (int(self.firsts[number]), int(self.ends[number]))
        ids = self.store.of_tokens("ids", *span).astype(np.int64)
        learnt = self.store.of_tokens("targets", *span)[1:]
        return ids[:-1], np.where(learnt, ids[1:], IGNORED)

    def summary(self) -> str:
        """The number of examples, their mean length, and the share of the rows' positions that are not padding."""
        tokens = int((self.ends - self.firsts - 1).sum())
        rows, mean = len(self), tokens / len(self.ends)
        about = f"{len(self.ends):,} examples of {mean:.1f} tokens on average"
        if rows == len(self.ends):
            return f"{about}, one per row"
        return f"{about} in {rows:,} rows of {self.length}, {tokens / (rows * self.length):.1%} full"


def pack(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row (examples,) of each example, given its number of tokens in `sizes`, which is at most `length`.

    The algorithm is best fit (Johnson et al. 1974, SIAM Journal on Computing 3) with a bounded number of open rows. An
    example is assigned to the fullest open row with enough space, or else to a new row. Time and memory are linear in
    the number of examples."""
    rows = np.empty(len(sizes), np.int64)
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted so that the fullest row is first
    rows_used = 0
    for number, size in enumerate(sizes.tolist()):
        index = bisect_left(open_rows, (size, 0))
        if index < len(open_rows):
            room, row = open_rows.pop(index)
        else:
            room, row, rows_used = length, rows_used, rows_used + 1
        rows[number] = row
        if room > size:
            insort(open_rows, (room - size, row))
        if len(open_rows) > OPEN_ROWS:
            open_rows.pop(0)
    return rows
