"""A flat piece of a shard as rectangles (boxes) of the logical tensor, so that pieces of different layouts can be
intersected.

Elements a to b of a flattened matrix are the end of a first row, some full rows, and the start of a last row: three
rectangles, each contiguous in the piece. For more than two dims the same holds recursively within a row.
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
    """`ranges` of a logical tensor, stored contiguously in a flat piece from its element `offset` on."""

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
    """Elements `start` to `start` + `count` of a shard's flattened local tensor as boxes of the logical tensor.

    Boxes of padding lie beyond the logical tensor's end, so they intersect only each other."""
    first = shard.index * shard.local_shape[shard.dim]
    boxes = []
    for offset, local in _rectangles(shard.local_shape, start, start + count):
        part = local[shard.dim]
        moved = slice(part.start + first, part.stop + first)
        boxes.append(Box(offset - start, (*local[: shard.dim], moved, *local[shard.dim + 1 :])))
    return boxes


@dataclass(frozen=True)
class Shared:
    """A rectangle that two pieces of one logical tensor share: slices `into` the box `mine` of the first piece, and
    slices `out_of` the box `theirs` of the second."""

    mine: Box
    into: Ranges
    theirs: Box
    out_of: Ranges

    @property
    def ranges(self) -> Ranges:
        """The rectangle in the logical tensor."""
        pairs = zip(self.mine.ranges, self.into, strict=True)
        return tuple(slice(outer.start + inner.start, outer.start + inner.stop) for outer, inner in pairs)


def shared_by(mine: list[Box], theirs: list[Box]) -> Iterator[Shared]:
    """The rectangles that two pieces share: the nonempty intersections of their boxes."""
    for a in mine:
        for b in theirs:
            common = overlap(a.ranges, b.ranges)
            if common is not None:
                yield Shared(a, common[0], b, common[1])


def _rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Ranges]]:
    """Elements `start` to `stop` of a flattened tensor of `shape` as rectangles, each with its first element's
    index."""
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
