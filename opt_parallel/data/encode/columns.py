"""The arrays of encoded documents: encoders return them, token stores hold them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Column:
    """The type of an array: `dtype` as NumPy names it, `width` numbers per token or per document."""

    dtype: str
    per_token: bool = False
    width: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return np.dtype(self.dtype).itemsize * self.width


LENGTHS = Column("uint32")  # number of tokens of each document


def ids_column(tokens: int) -> Column:
    """The column of ids below `tokens`, in the smallest integer type that holds them."""
    return Column(str(np.min_scalar_type(tokens - 1)), per_token=True)


@dataclass
class Encoded:
    """A batch of documents: `ids` (tokens,), `lengths` (documents,) and the encoder's own columns. `counts`: documents
    that were left out or cut, by reason. `text_bytes`: their size in UTF-8, if the encoder counts it, else 0."""

    columns: dict[str, np.ndarray]
    counts: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0


def columns_of(documents: list[list[int]]) -> dict[str, np.ndarray]:
    """The columns `ids` and `lengths` of documents."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    ids = np.fromiter((token for ids in documents for token in ids), np.int64, int(lengths.sum()))
    return {"ids": ids, "lengths": lengths}
