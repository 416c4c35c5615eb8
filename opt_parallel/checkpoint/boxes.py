"""A flat piece of a shard as rectangles of the logical tensor, so that pieces of different layouts can be compared.

Elements a to b of a flattened matrix are the rest of a first row, some full rows, and the beginning of a last one:
three rectangles, each contiguous in the piece. The same holds within a row of a tensor with more dims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from opt_parallel.parallel.shard import Shard, overlap

Ranges = tuple[slice, ...]


@dataclass(frozen=True)
class Box:
    """`ranges` of a logical tensor, which lie one after another in a flat piece, from its element `offset` on."""

    offset: int
    ranges: Ranges

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.ranges)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """The rectangle as a view into the piece's values."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


def boxes_of(shard: Shard, start: int, count: int) -> list[Box]:
    """Elements `start` to `start` + `count` of a shard's flattened local tensor as boxes of the logical one.

    Rows of padding lie beyond the logical tensor's end, where no other box is."""
    first = shard.index * shard.local_shape[shard.dim]
    boxes = []
    for offset, local in _rectangles(shard.local_shape, start, start + count):
        part = local[shard.dim]
        moved = slice(part.start + first, part.stop + first)
        boxes.append(Box(offset - start, (*local[: shard.dim], moved, *local[shard.dim + 1 :])))
    return boxes


@dataclass(frozen=True)
class Shared:
    """What two pieces of one logical tensor have in common: a box of each, and where in it."""

    mine: Box
    into: Ranges
    theirs: Box
    out_of: Ranges

    @property
    def ranges(self) -> Ranges:
        """Of the logical tensor."""
        pairs = zip(self.mine.ranges, self.into, strict=True)
        return tuple(slice(whole.start + part.start, whole.start + part.stop) for whole, part in pairs)


def shared_by(mine: list[Box], theirs: list[Box]) -> Iterator[Shared]:
    """The rectangles that lie in a box of each of two pieces."""
    for a in mine:
        for b in theirs:
            common = overlap(a.ranges, b.ranges)
            if common is not None:
                yield Shared(a, common[0], b, common[1])


def _rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Ranges]]:
    """Elements `start` to `stop` of a flattened tensor of `shape`: rectangles, and each one's first element."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield start, (slice(start, stop),)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # full rows
    if first > last:  # within one row
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        yield first * row, (slice(first, last), *(slice(0, size) for size in shape[1:]))
    yield from _within_row(shape, last, last * row, stop)


def _within_row(shape: tuple[int, ...], number: int, start: int, stop: int) -> Iterator[tuple[int, Ranges]]:
    before = number * math.prod(shape[1:])
    for offset, ranges in _rectangles(shape[1:], start - before, stop - before):
        yield before + offset, (slice(number, number + 1), *ranges)
