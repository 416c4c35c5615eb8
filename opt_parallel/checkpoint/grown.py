"""A checkpoint with rows added to its embedding, for a tokenizer with more tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opt_parallel.checkpoint.lora import Weights
from opt_parallel.parallel.shard import Constant, Shard

EMBEDDING = "decoder.embed_tokens.weight"
CHUNK = 4096  # rows read at a time for their mean


@dataclass(frozen=True)
class _Rows(Shard):
    """Rows `first` to `last` of a logical tensor, with all columns."""

    first: int
    last: int

    @property
    def range(self) -> tuple[slice, ...]:
        return (slice(self.first, self.last), *(slice(0, size) for size in self.shape[1:]))


class Grown:
    """A source of `weights` whose embedding has `rows` rows; each further row that is read is their mean.

    transformers' `resize_token_embeddings` draws new rows around this mean (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"): an untrained token is then not more likely than the average token. The
    mean is computed in float64 in a fixed order, so that its bits do not depend on the layout."""

    def __init__(self, weights: Weights, rows: int) -> None:
        self.weights, self.rows = weights, rows
        self.dtype = torch.promote_types(weights.dtype, torch.float32)  # a mean needs more digits than its summands

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the tensors `wanted` are there; of the embedding, the first rows suffice."""
        self.weights.check({**wanted, EMBEDDING: (self.rows, *wanted[EMBEDDING][1:])})

    def holds(self, name: str) -> bool:
        """Whether there is a logical tensor of that name."""
        return self.weights.holds(name)

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The values of `shard.range` of the logical tensor `name`. Raises: UserError if a file is damaged."""
        if name != EMBEDDING:
            return self.weights(name, shard)
        rows, width = shard.range[0], shard.shape[1]
        old = self._read(min(rows.start, self.rows), min(rows.stop, self.rows), width)
        added = rows.stop - rows.start - len(old)
        return torch.cat([old.float(), self._mean(width).expand(added, width)]) if added else old

    def _read(self, first: int, last: int, width: int) -> Tensor:
        return self.weights(EMBEDDING, _Rows((self.rows, width), 0, 0, 1, Constant(0.0), False, first, last))

    def _mean(self, width: int) -> Tensor:
        """The mean of all rows (1, D). numpy sums rows one after another, whatever the number of threads."""
        total = torch.zeros(width, dtype=torch.float64)
        for first in range(0, self.rows, CHUNK):
            rows = self._read(first, min(first + CHUNK, self.rows), width).double()
            total += torch.from_numpy(rows.numpy().sum(axis=0))
        return (total / self.rows).float().unsqueeze(0)
