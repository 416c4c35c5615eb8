"""Describes a flat piece of a tensor's part as rectangles (boxes) of the full tensor.

The rectangles of pieces from different parallel layouts can be intersected. Elements a to b of a flattened matrix are
three rectangles: the end of a first row, some full rows, and the start of a last row. Each rectangle is contiguous in
the piece. A tensor with more than two dims is treated recursively in the same way.
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
    """A rectangle `ranges` of a full tensor, which is stored contiguously in a flat piece from element `offset` on."""

    offset: int
    ranges: Ranges

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.ranges)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """The rectangle's elements as a view of the piece's values `flat`."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


def boxes_of(shard: Shard, start: int, count: int) -> list[Box]:
    """The elements `start` to `start` + `count` of a shard's flattened local tensor, as rectangles of the full tensor.

    A rectangle of padding is beyond the end of the full tensor, so it intersects only other padding."""
    first = shard.index * shard.local_shape[shard.dim]
    boxes = []
    for offset, local in _rectangles(shard.local_shape, start, start + count):
        part = local[shard.dim]
        moved = slice(part.start + first, part.stop + first)
        boxes.append(Box(offset - start, (*local[: shard.dim], moved, *local[shard.dim + 1 :])))
    return boxes


def span_of(shard: Shard, ranges: Ranges) -> tuple[int, int]:
    """The first index and the end of the elements `ranges` of a full tensor in a shard's flattened local tensor.

    Elements between the two may be outside of `ranges`."""
    first = last = 0
    for dim, (part, size) in enumerate(zip(ranges, shard.local_shape, strict=True)):
        moved = shard.index * size if dim == shard.dim else 0
        first = first * size + max(part.start - moved, 0)
        last = last * size + min(part.stop - moved, size) - 1
    return first, last + 1


@dataclass(frozen=True)
class Shared:
    """The intersection of the rectangle `mine` of one piece and the rectangle `theirs` of another piece.

    `into` are the slices of `mine` that give the intersection, and `out_of` are the slices of `theirs`."""

    mine: Box
    into: Ranges
    theirs: Box
    out_of: Ranges

    @property
    def ranges(self) -> Ranges:
        """The slices of the full tensor that give the intersection."""
        pairs = zip(self.mine.ranges, self.into, strict=True)
        return tuple(slice(outer.start + inner.start, outer.start + inner.stop) for outer, inner in pairs)


def shared_by(mine: list[Box], theirs: list[Box]) -> Iterator[Shared]:
    """The nonempty intersections of the rectangles of one piece with the rectangles of another piece."""
    for a in mine:
        for b in theirs:
            common = overlap(a.ranges, b.ranges)
            if common is not None:
                yield Shared(a, common[0], b, common[1])


def _rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Ranges]]:
    """The elements `start` to `stop` of a flattened tensor of `shape` as rectangles, each with its first index."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield start, (slice(start, stop),)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # The range of full rows.
    if first > last:  # All elements are in one row.
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
