"""Reads a checkpoint with additional rows of its embedding, for a tokenizer with more tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opt_parallel.checkpoint.lora import Weights
from opt_parallel.parallel.shard import Constant, Shard

EMBEDDING = "decoder.embed_tokens.weight"
CHUNK = 4096  # number of rows that are read at a time to compute the mean


@dataclass(frozen=True)
class _Rows(Shard):
    """The rows `first` to `last` of a full tensor, with all columns."""

    first: int
    last: int

    @property
    def range(self) -> tuple[slice, ...]:
        return (slice(self.first, self.last), *(slice(0, size) for size in self.shape[1:]))


class Grown:
    """The tensors of `weights`, with an embedding that has `rows` rows. Each new row is the mean of the old rows.

    An untrained token is then not more likely than the average token. `resize_token_embeddings` of transformers
    generates random rows around this mean (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models"). The mean is computed in float64 in a fixed order, so its bits do not depend on the parallel layout."""

    def __init__(self, weights: Weights, rows: int) -> None:
        self.weights, self.rows = weights, rows
        self.dtype = torch.promote_types(weights.dtype, torch.float32)  # bf16 is too imprecise for the mean of rows

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the checkpoint contains the tensors `wanted`, with at most these rows of embedding."""
        self.weights.check({**wanted, EMBEDDING: (self.rows, *wanted[EMBEDDING][1:])})

    def holds(self, name: str) -> bool:
        """Whether the checkpoint contains the full tensor `name`."""
        return self.weights.holds(name)

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The elements `shard.range` of the full tensor `name`. Raises: UserError if a file is damaged."""
        if name != EMBEDDING:
            return self.weights(name, shard)
        rows, width = shard.range[0], shard.shape[1]
        old = self._read(min(rows.start, self.rows), min(rows.stop, self.rows), width)
        added = rows.stop - rows.start - len(old)
        return torch.cat([old.float(), self._mean(width).expand(added, width)]) if added else old

    def _read(self, first: int, last: int, width: int) -> Tensor:
        return self.weights(EMBEDDING, _Rows((self.rows, width), 0, 0, 1, Constant(0.0), False, first, last))

    def _mean(self, width: int) -> Tensor:
        """The mean (1, D) of all rows. NumPy adds the rows in a fixed order for any number of threads."""
        total = torch.zeros(width, dtype=torch.float64)
        for first in range(0, self.rows, CHUNK):
            rows = self._read(first, min(first + CHUNK, self.rows), width).double()
            total += torch.from_numpy(rows.numpy().sum(axis=0))
        return (total / self.rows).float().unsqueeze(0)
