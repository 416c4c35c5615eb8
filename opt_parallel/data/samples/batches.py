"""Collates samples into micro-batches for training (from a mixture of sources) and for validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch

from opt_parallel.config.model import IGNORED
from opt_parallel.data.samples.mixture import Mixture
from opt_parallel.data.samples.samples import Batch, Sample, Samples, collate
from opt_parallel.parallel.topology import Topology
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import INTERRUPTED, STOPPED, Unread, UserError

STEPS_AHEAD = 2  # number of optimizer steps whose batches are prepared in advance


class Totals(NamedTuple):
    """The numbers of targets, and of tokens without padding, in the global batch of a step."""

    targets: int
    tokens: int


@dataclass(frozen=True)
class Feed:
    """The training batches of one data-parallel rank, for any position of the run.

    `global_batch` is the number of samples of an optimizer step, a multiple of `micro_batch` · `data_size`."""

    mixture: Mixture
    global_batch: int
    micro_batch: int
    data_rank: int
    data_size: int
    pad_token_id: int = 1

    def at(self, samples: int) -> list[Batch]:
        """This rank's micro-batches of the optimizer step that starts at sample number `samples` of the run."""
        first = samples + self.data_rank * self.micro_batch
        starts = range(first, samples + self.global_batch, self.micro_batch * self.data_size)
        return [self._batch(range(start, start + self.micro_batch)) for start in starts]

    def _batch(self, ordinals: range) -> Batch:
        return collate([self.mixture.sample(ordinal) for ordinal in ordinals], ordinals, self.pad_token_id)


class Loader:
    """Prepares the batches of a `Feed` in a background thread. With a GPU, the batches are in pinned memory."""

    def __init__(self, feed: Feed, clock: Clock, stop: int, device: torch.device) -> None:
        """Start to prepare the batches from the position `clock` to step `stop`."""
        self.feed, self.pin = feed, device.type == "cuda"
        self.waited = 0.0  # seconds that the last call of `next` waited for data
        self._wanted = True
        self._ready: Queue[list[Batch] | Exception] = Queue(STEPS_AHEAD - 1)  # the thread holds another step's batches
        last = clock.samples + (stop - clock.step) * feed.global_batch
        positions = range(clock.samples, last, feed.global_batch)
        # The thread is a daemon, so that a failing process does not wait until this thread gets its data.
        Thread(target=self._load, args=(positions,), name="loader", daemon=True).start()

    def next(self) -> list[Batch]:
        """The micro-batches of the next optimizer step. Raises: the error of the background thread, if it failed."""
        started = time.perf_counter()
        ready = self._ready.get()
        self.waited = time.perf_counter() - started
        if isinstance(ready, Exception):
            raise ready
        return ready

    def close(self) -> None:
        """End the background thread, and discard its batches."""
        self._wanted = False
        with suppress(Empty):
            self._ready.get_nowait()

    def _load(self, positions: range) -> None:
        try:
            for position in positions:
                batches = self.feed.at(position)
                self._ready.put([batch.pinned() for batch in batches] if self.pin else batches)
                if not self._wanted:
                    return
        except Exception as error:  # `next` raises the error in the training loop
            self._ready.put(error)


class Ahead:
    """Reads the batches of one step ahead of the loop, and exchanges what all ranks must know about that step.

    There is one exchange for each step, a sum over all ranks. It starts before the previous step is computed, and is
    read after that step, so that no rank waits for it. `status` returns this rank's exit status after a signal, or 0.
    """

    def __init__(self, loader: Loader, topology: Topology, status: Callable[[], int]) -> None:
        """Read the batches of the first step, and start their exchange."""
        self._loader, self._topology, self._own_status = loader, topology, status
        self.waited = 0.0  # seconds that the batches of `take` kept this rank waiting
        self._start()

    def _start(self) -> None:
        """Read the batches of the next step, and start their exchange."""
        batches: list[Batch] = []
        self._mistake: UserError | None = None
        try:
            batches = self._loader.next()
        except UserError as error:
            self._mistake = error
        status, counts = self._own_status(), self._topology.tensor.rank == 0  # tensor ranks read the same batches
        self._batches = batches
        self._sums = self._topology.start_sum(
            [
                self._mistake is not None,
                status == INTERRUPTED,
                status == STOPPED,
                sum(batch.targets for batch in batches) if counts else 0,
                sum(batch.tokens for batch in batches) if counts else 0,
            ]
        )

    def take(self, last: bool) -> tuple[list[Batch], Totals]:
        """This rank's micro-batches of the step, and the numbers of the global batch. Unless the step is the `last`,
        the batches of the next step are read, and their exchange starts.

        Raises: Unread on every rank, if the text of any rank cannot be read."""
        failed, _, _, targets, tokens = self._sums()
        if failed:
            raise _unread(self._mistake, self._topology)
        self.waited, batches = self._loader.waited, self._batches
        if not last:
            self._start()
        return batches, Totals(targets, tokens)

    def status(self) -> int:
        """The exit status if any rank was asked to stop before the exchange, else 0. It is the same on all ranks.

        A process without other ranks also notices a later request."""
        if self._topology.world.size == 1:
            return self._own_status()
        _, interrupted, stopped, _, _ = self._sums()
        return max(INTERRUPTED * (interrupted > 0), STOPPED * (stopped > 0))


def read_together(batches: Iterator[Batch], topology: Topology) -> Iterator[Batch]:
    """This rank's `batches`, of which all ranks have the same number. Each batch is read, and the exchange of errors
    starts, before the caller gets the previous batch.

    Raises: Unread on every rank, if a batch of any rank raises UserError, so that all ranks can save a checkpoint."""
    batch, mistake, failures = _read(batches, topology)
    while True:
        if failures()[0]:
            raise _unread(mistake, topology)
        if batch is None:
            return
        present = batch
        batch, mistake, failures = _read(batches, topology)
        yield present


def _read(
    batches: Iterator[Batch], topology: Topology
) -> tuple[Batch | None, UserError | None, Callable[[], list[int]]]:
    """The next batch, or None at the end, the error of reading it, and the started sum of the ranks' errors."""
    batch, mistake = None, None
    try:
        batch = next(batches, None)
    except UserError as error:
        mistake = error
    return batch, mistake, topology.start_sum([mistake is not None])


def _unread(mistake: UserError | None, topology: Topology) -> Unread:
    """The error for all ranks, with the message of the first rank that has a `mistake`."""
    messages = topology.exchange(mistake and str(mistake))
    error = Unread(next(line for line in messages if line), shared=True)
    error.__cause__ = mistake
    return error


def validation_batches(
    samples: Samples, micro_batch: int, data_rank: int, data_size: int, pad_token_id: int = 1
) -> Iterator[Batch]:
    """This data-parallel rank's validation batches. Over all ranks, the batches contain each sample once, in order.

    All data ranks get the same number of batches and samples, because ZeRO-3 gathers weights in every forward pass. So
    the last batches are filled up with samples whose labels are ignored."""
    stride = micro_batch * data_size
    for start in range(data_rank * micro_batch, -(-len(samples) // stride) * stride, stride):
        ordinals = range(start, start + micro_batch)
        found = [samples.sample(min(ordinal, len(samples) - 1)) for ordinal in ordinals]
        rows = [
            sample if ordinal < len(samples) else _ignored(sample)
            for sample, ordinal in zip(found, ordinals, strict=True)
        ]
        yield collate(rows, ordinals, pad_token_id)


def _ignored(sample: Sample) -> Sample:
    filling = np.nan if sample.labels.dtype.kind == "f" else IGNORED
    return Sample(sample.ids, np.full_like(sample.labels, filling), sample.segments, sample.positions)
