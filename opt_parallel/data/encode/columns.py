"""The arrays of encoded documents (columns), which encoders return and token stores hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Column:
    """The type of an array, which has `width` numbers of NumPy's `dtype` for each token or each document."""

    dtype: str
    per_token: bool = False
    width: int = 1

    @property
    def itemsize(self) -> int:
        """Number of bytes for each token or each document."""
        return np.dtype(self.dtype).itemsize * self.width


LENGTHS = Column("uint32")  # the number of tokens of each document


def ids_column(tokens: int) -> Column:
    """The type of an array of token ids below `tokens`, in the smallest sufficient integer type."""
    return Column(str(np.min_scalar_type(tokens - 1)), per_token=True)


@dataclass
class Encoded:
    """A batch of encoded documents: the arrays `ids` (tokens,), `lengths` (documents,) and those of the encoder.

    `counts` has the numbers of documents that were left out or cut, by reason. `text_bytes` is the size of the batch in
    UTF-8, or 0 if the encoder does not count it."""

    columns: dict[str, np.ndarray]
    counts: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0


def columns_of(documents: list[list[int]]) -> dict[str, np.ndarray]:
    """The arrays `ids` and `lengths` of documents, which are given as lists of token ids."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    ids = np.fromiter((token for ids in documents for token in ids), np.int64, int(lengths.sum()))
    return {"ids": ids, "lengths": lengths}
