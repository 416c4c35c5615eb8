"""Micro-batches: rows of the store, shuffled for training and in order for validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from torch import Tensor

from opt_parallel.data.order import sample_at
from opt_parallel.shapes import IGNORED

ROWS_READ = 1024  # rows of the store held at a time while counting


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, the same on all its tensor ranks.

    `ids`, `labels`: (batch, sequence) int64; a label is the next token, or `IGNORED`. `positions`: (batch, sequence)
    int64; None: 0 to sequence − 1. `segments`: (batch, sequence) int64, tokens attend within theirs; None: one
    stream, nothing padded. `samples`: (batch,) int64, the ordinal of each sample in the run."""

    ids: Tensor
    labels: Tensor
    positions: Tensor | None
    segments: Tensor | None
    samples: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`, without waiting for the copies."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            ids=move(self.ids),
            labels=move(self.labels),
            positions=None if self.positions is None else move(self.positions),
            segments=None if self.segments is None else move(self.segments),
            samples=move(self.samples),
        )

    @property
    def targets(self) -> int:
        """Number of labels that count."""
        return int((self.labels != IGNORED).sum())


@dataclass
class Feed:
    """The training samples of one data-parallel rank, from any position of the run.

    `blocks`: the store or its folder. `global_batch`: samples of an optimizer step, a multiple of
    `micro_batch` · `data_size`."""

    blocks: Dataset | Path | str
    seed: int
    global_batch: int
    micro_batch: int
    data_rank: int
    data_size: int
    _rows: Dataset = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.global_batch % (self.micro_batch * self.data_size) == 0
        self._rows = open_blocks(self.blocks)

    def at(self, samples: int) -> list[Batch]:
        """The micro-batches of the optimizer step that begins at sample `samples` of the run."""
        first = samples + self.data_rank * self.micro_batch
        starts = range(first, samples + self.global_batch, self.micro_batch * self.data_size)
        return [self._batch(range(start, start + self.micro_batch)) for start in starts]

    def _batch(self, ordinals: range) -> Batch:
        rows = [sample_at(self.seed, ordinal, len(self._rows)) for ordinal in ordinals]
        return _batch(self._rows, rows, ordinals)


def validation_batches(
    blocks: Dataset | Path | str, micro_batch: int, data_rank: int, data_size: int
) -> Iterator[Batch]:
    """Every block once, in order, over all data ranks: as many batches of the same size on each.

    ZeRO-3 gathers weights in every forward, so no rank may run one more; what is missing at the end is filled with
    samples none of whose labels count."""
    blocks = open_blocks(blocks)
    stride = micro_batch * data_size
    for start in range(data_rank * micro_batch, -(-len(blocks) // stride) * stride, stride):
        ordinals = range(start, start + micro_batch)
        batch = _batch(blocks, [min(ordinal, len(blocks) - 1) for ordinal in ordinals], ordinals)
        batch.labels[batch.samples >= len(blocks)] = IGNORED
        yield batch


def open_blocks(blocks: Dataset | Path | str) -> Dataset:
    """The store, memory-mapped, giving rows as NumPy arrays of `sequence + 1` tokens."""
    dataset = blocks if isinstance(blocks, Dataset) else load_from_disk(str(blocks))
    assert isinstance(dataset, Dataset)
    return dataset.with_format("numpy")


def unigram_entropy(blocks: Dataset | Path | str) -> float:
    """Entropy in nats of the targets' own distribution: the loss of a model that knows only word counts."""
    blocks = open_blocks(blocks)
    counts = np.zeros(0, np.int64)
    for start in range(0, len(blocks), ROWS_READ):
        more = np.bincount(blocks[start : start + ROWS_READ]["ids"][:, 1:].reshape(-1), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _batch(blocks: Dataset, rows: list[int], ordinals: range) -> Batch:
    tokens = torch.from_numpy(np.asarray(blocks[rows]["ids"], np.int64))
    return Batch(
        ids=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        positions=None,
        segments=None,
        samples=torch.tensor(list(ordinals)),
    )
