"""Reads the samples of a token store by index, and collates samples into batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opt_parallel.config.model import IGNORED
from opt_parallel.data.store.statistics import entropy
from opt_parallel.data.store.store import Damaged, TokenStore

TOKENS_READ = 1 << 20  # number of tokens that `unigram_entropy` reads at a time


@dataclass(frozen=True)
class Sample:
    """A training sample with token `ids` (S,) and `labels`.

    The labels of a language model are (S,) int64, and each label is the next token or `IGNORED`. The label of a
    classifier is () int64 or (N,) float32. If the sample contains several texts, `segments` (S,) is the number of each
    token's text (from 1), and `positions` (S,) are counted within each text. A sample with one text has None in both
    fields."""

    ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray | None = None
    positions: np.ndarray | None = None


class Samples(Protocol):
    """The samples that a task cuts from one token store."""

    def __len__(self) -> int: ...

    def sample(self, number: int) -> Sample: ...


class Rows:
    """The samples of pretraining. All tokens of the token store form one sequence, which is cut into rows.

    Row i has the tokens i·length to (i + 1)·length (inclusive). The last token of a row is a target of this row, and
    the first input of the next row. So every token except the first is a target exactly once."""

    def __init__(self, store: TokenStore, length: int) -> None:
        self.store, self.length = store, length

    def __len__(self) -> int:
        return max(0, self.store.tokens - 1) // self.length

    def sample(self, number: int) -> Sample:
        start = number * self.length
        tokens = self.store.of_tokens("ids", start, start + self.length + 1).astype(np.int64)
        return Sample(tokens[:-1], tokens[1:])

    @cached_property
    def unigram_entropy(self) -> float:
        """The entropy (in nats) of the distribution of target tokens."""
        counts = np.zeros(0, np.int64)
        last = len(self) * self.length + 1
        for start in range(1, last, TOKENS_READ):
            tokens = self.store.of_tokens("ids", start, min(start + TOKENS_READ, last))
            more = np.bincount(tokens, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        return entropy(counts)


class Labelled:
    """The samples of a classifier. Each document of the token store is one sample."""

    def __init__(self, store: TokenStore, labels: int | None = None) -> None:
        """`labels` is the number of classes."""
        self.store, self.labels = store, labels

    def __len__(self) -> int:
        return self.store.documents

    def sample(self, number: int) -> Sample:
        start, stop = (int(offset) for offset in self._starts[number : number + 2])
        label = self.store.of_documents("label", number, number + 1)[0]
        integer = label.dtype.kind == "i"
        if not (0 <= label < (self.labels or math.inf) if integer else np.isfinite(label).all()):
            raise Damaged(self.store.folder, f"example {number} has the label {label}")
        target = np.array(label, np.int64) if integer else np.atleast_1d(label)
        return Sample(self.store.of_tokens("ids", start, stop).astype(np.int64), target)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], self.store.ends])


@dataclass(frozen=True)
class Batch:
    """A micro-batch of a data-parallel rank, which is identical on all ranks of a tensor group.

    Attributes:
        ids: token ids (batch, sequence) int64.
        labels: the next token or `IGNORED`, (batch, sequence) int64. The labels of a classifier are (batch,) int64, or
            (batch, N) float32 with NaN for an ignored label.
        positions: (batch, sequence) int64, or None if the model derives the positions from the segments.
        segments: (batch, sequence) int64, the number of each token's text, and 0 for padding. Tokens attend only within
            their text. None means one text per row without padding.
        samples: the index of each sample in the run, (batch,) int64."""

    ids: Tensor
    labels: Tensor
    positions: Tensor | None
    segments: Tensor | None
    samples: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """A copy of the batch on `device`. The copy is asynchronous."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """A copy of the batch in pinned memory, from which a GPU can copy asynchronously."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            ids=change(self.ids),
            labels=change(self.labels),
            positions=None if self.positions is None else change(self.positions),
            segments=None if self.segments is None else change(self.segments),
            samples=change(self.samples),
        )

    @property
    def targets(self) -> int:
        """The number of labels that are not ignored."""
        return int(self.counting.sum())

    @property
    def counting(self) -> Tensor:
        """A mask that is true for labels that are not ignored: (batch, sequence), or (batch,) for a classifier."""
        return ~self.labels.isnan().any(dim=-1) if self.labels.is_floating_point() else self.labels != IGNORED

    @property
    def tokens(self) -> int:
        """The number of tokens that are not padding."""
        return self.ids.numel() if self.segments is None else int((self.segments > 0).sum())


def collate(samples: list[Sample], ordinals: range, pad_token_id: int) -> Batch:
    """A batch of samples, which are padded on the right to the length of the longest sample."""
    longest = max(len(sample.ids) for sample in samples)
    padded = any(len(sample.ids) < longest for sample in samples)
    of_tokens = samples[0].labels.ndim == 1 and samples[0].labels.dtype.kind == "i"

    def stacked(arrays: list[np.ndarray], filling: int) -> Tensor:
        rows = np.full((len(arrays), longest), filling, np.int64)
        for row, array in zip(rows, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(rows)

    segments = [np.ones_like(each.ids) if each.segments is None else each.segments for each in samples]
    positions = [np.arange(len(each.ids)) if each.positions is None else each.positions for each in samples]
    marked = padded or any(each.segments is not None for each in samples)
    labels = [each.labels for each in samples]
    return Batch(
        ids=stacked([each.ids for each in samples], pad_token_id),
        labels=stacked(labels, IGNORED) if of_tokens else torch.from_numpy(np.stack(labels)),
        positions=stacked(positions, -1) if marked else None,
        segments=stacked(segments, 0) if marked else None,
        samples=torch.tensor(list(ordinals)),
    )
