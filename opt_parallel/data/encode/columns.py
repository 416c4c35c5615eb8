"""The arrays that documents become: what encoders hand over and token stores hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Column:
    """Arrays of one name: `dtype` as NumPy names it, `width` numbers for each token or each document."""

    dtype: str
    per_token: bool = False
    width: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return np.dtype(self.dtype).itemsize * self.width


LENGTHS = Column("uint32")  # tokens of each document


def ids_column(tokens: int) -> Column:
    """The column of ids below `tokens`, in the smallest type that holds them."""
    return Column(str(np.min_scalar_type(tokens - 1)), per_token=True)


@dataclass
class Encoded:
    """Some documents in arrays: `ids` (tokens,), `lengths` (documents,) and the encoder's own columns; `counts` says
    in words what was left out or cut; `text_bytes` of the documents in UTF-8, where the encoder counts them."""

    columns: dict[str, np.ndarray]
    counts: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0


def columns_of(documents: list[list[int]]) -> dict[str, np.ndarray]:
    """`ids` and `lengths` of some documents."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    ids = np.fromiter((token for ids in documents for token in ids), np.int64, int(lengths.sum()))
    return {"ids": ids, "lengths": lengths}
