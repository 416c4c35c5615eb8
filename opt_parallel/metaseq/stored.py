"""Where the values of a stored tensor are: which file, which byte, which rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from opt_parallel.metaseq.pickled import ITEM_BYTES


@dataclass(frozen=True, slots=True)
class Piece:
    """Contiguous elements in a file, from byte `skip` of the record whose header is at byte `header`.

    A NumPy file has no records. Its `header` is None, and `skip` counts from the start of the file."""

    path: Path
    header: int | None
    skip: int


@dataclass(frozen=True, slots=True)
class Flat:
    """A flat tensor that is cut into pieces of `length` elements each. The last elements may be padding."""

    pieces: tuple[Piece, ...]
    length: int
    dtype: str

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of one model part: `shape` elements of a flat tensor from element `start` on, with `step` elements from
    the start of one row to the start of the next one."""

    flat: Flat
    start: int
    shape: tuple[int, ...]
    step: int

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.flat.item


Ranges = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """The elements `ranges` of a full tensor, which are the rows of `stored` from row `first` on."""

    ranges: Ranges
    stored: Stored
    first: int


@dataclass(frozen=True, slots=True)
class Full:
    """A full tensor, its blocks in the model parts, and the further copies of a tensor that every part holds whole."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    copies: tuple[Stored, ...] = ()
