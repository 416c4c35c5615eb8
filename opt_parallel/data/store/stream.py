"""Fills the token store of a stream while training reads it. On each host, one process (the filler) fills the store.

The order of samples depends only on the order of the text, and not on the progress of the filler. If the filler is too
slow, training waits. After a stop, the filler resumes after the last complete part. The filler stops when the store has
all tokens that the run will read.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from operator import itemgetter
from pathlib import Path

from filelock import FileLock, Timeout

from opt_parallel.config.model import require
from opt_parallel.data.encode.columns import Column
from opt_parallel.data.encode.pretrain import batches_of
from opt_parallel.data.store import workers
from opt_parallel.data.store.failure import failure_of, forget_failure, record_failure
from opt_parallel.data.store.parts import PartMaker, PartMeta, read_meta
from opt_parallel.data.store.recipe import Recipe
from opt_parallel.data.store.statistics import finish_store
from opt_parallel.data.store.store import MANIFEST, META, Part, TokenStore, part_name
from opt_parallel.data.store.workers import Pulse, Unfinished
from opt_parallel.data.text.records import LEFT_OUT, LISTED, BadRecord, BadRecords, Item
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import cpus
from opt_parallel.runtime.process import local_rank
from opt_parallel.runtime.signals import ignore_all
from opt_parallel.runtime.terminal import open_streams, outlive
from opt_parallel.storage.atomic import PARTIAL, remove

PART_TOKENS, PART_SECONDS = 1 << 20, 5.0  # A part ends after this number of tokens or seconds.
BLOCK = 4096  # Number of samples that are shuffled together.
LOOK = 0.2  # Seconds between two checks for new parts.
LOST = 30.0  # Seconds without a filler after which a waiting process raises an error.


@dataclass(frozen=True)
class Filling:
    """Encodes the corpus of `recipe` into the token store at `folder`, until the store has `enough` tokens."""

    folder: Path
    recipe: Recipe
    enough: int
    workers: int
    part_tokens: int = PART_TOKENS

    def start(self) -> BaseProcess | None:
        """Start a process that fills the token store, on local rank 0. The process ends when its parent ends."""
        if local_rank() != 0:
            return None
        filler = multiprocessing.get_context("spawn").Process(target=_fill_beside, args=(self,), daemon=True)
        filler.start()
        threading.Thread(target=self._watch, args=(filler,), daemon=True).start()
        return filler

    def _watch(self, filler: BaseProcess) -> None:
        """Kill the filler and record a failure for the waiting processes, if the filler makes no progress."""
        pulse = Pulse(filler.pid)
        while not wait([filler.sentinel], workers.LOOK):
            try:
                pulse.look(f"which fills {self.folder}")
            except Unfinished as error:
                with suppress(OSError):  # without the record, waiting processes still notice the end of the filler
                    record_failure(self.folder, str(error))
                filler.kill()
                return

    @property
    def threads(self) -> int:
        """The number of encoding threads. The default is half of the CPUs, because training uses the other half."""
        return self.workers or max(1, cpus() // 2)

    def complete(self) -> None:
        """Fill the token store in this process, or wait until another process has filled it. Raises: UserError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(lock_of(self.folder)):
                forget_failure(self.folder)
                try:
                    if not (self.folder / MANIFEST).exists():
                        self._fill()
                except UserError as error:
                    record_failure(self.folder, str(error))
                    raise
        except OSError as error:  # the cache has failed, because a text file that cannot be read raises a UserError
            line = f"data.cache={self.folder.parent} cannot be written ({error}): choose another data.cache"
            with suppress(OSError):
                record_failure(self.folder, line)
            raise UserError(line) from error

    def _fill(self) -> None:
        """Fill the token store, starting after its last complete part."""
        corpus, encoder = self.recipe.corpus, self.recipe.encoder
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            remove(leftover)
        metas, before = complete_parts(self.folder), corpus.identity()
        for part in sorted(self.folder.glob("part-*"))[len(metas) :]:
            remove(part)  # the first of these parts is damaged
        done = sum(meta.part.tokens for meta in metas)
        position = (metas[-1].position[0], metas[-1].position[1]) if metas else (0, 0)
        if done >= self.enough:
            return
        maker = PartMaker(self.folder, part_name(len(metas)), encoder.columns)
        bad, started = BadRecords(), time.monotonic()
        try:
            for next_position, batch in _batches(corpus, *position):
                maker.write(encoder.encode(self.recipe.good(batch, bad)))
                position, tokens = next_position, maker.writer.tokens
                full = tokens >= self.part_tokens or time.monotonic() - started > PART_SECONDS
                if full or done + tokens >= self.enough:
                    metas.append(maker.finish(position, bad=bad))
                    done += tokens
                    if done >= self.enough:
                        return
                    maker, bad = PartMaker(self.folder, part_name(len(metas)), encoder.columns), BadRecords()
                    started = time.monotonic()
        except UserError as error:
            if maker.writer.documents:
                maker.finish(position, bad=bad)  # keeps the records before the error
            if isinstance(error, BadRecord):
                raise UserError(f"{error}; data.bad_records=skip leaves such records out") from error
            raise
        metas.append(maker.finish(position, bad=bad))
        require(
            corpus.identity() == before,
            f"{corpus.key}: {corpus.names} changed while it was read: wait until it is complete, then start again",
        )
        finish_store(self.folder, encoder.columns, metas, None)


def _batches(corpus: Corpus, unit: int, taken: int) -> Iterator[tuple[tuple[int, int], list[Item]]]:
    """Batches of the records of a corpus, each with the position (unit, number of its records) after the batch.

    The first batch starts after the first `taken` records of `unit`."""
    for number, group in groupby(corpus.streamed(unit, taken), key=itemgetter(0)):
        taken = taken if number == unit else 0
        for batch in batches_of(item for _, item in group):
            taken += len(batch)
            yield (number, taken), batch


def complete_parts(folder: Path) -> list[PartMeta]:
    """The summaries of the parts before the first missing or damaged part."""
    metas: list[PartMeta] = []
    with suppress(UserError):
        while (part := folder / part_name(len(metas)) / META).exists():
            metas.append(read_meta(part.parent))
    return metas


def lock_of(folder: Path) -> str:
    return f"{folder}.lock"


class GrowingStore(TokenStore):
    """A token store to which another process (the filler) appends parts. Several threads may use the object."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], length: int, vocab_size: int | None = None) -> None:
        """`length` is the number of tokens of a row. Token ids must be below `vocab_size`."""
        self.folder, self.columns, self.length, self.vocab_size = folder, dict(columns), length, vocab_size
        self.parts: list[Part] = []
        self.bad = 0  # number of bad records that were left out so far
        self.remember()
        self._first_token, self._first_document = [0], [0]
        self.ended, self.looking = False, threading.Lock()
        self.old_failure = failure_of(folder)

    def arrived(self, rows: int) -> int | None:
        """Wait until the token store has `rows` rows or is complete.

        The method returns the total number of rows, or None if it is not yet known. Raises: UserError if the filler
        fails or has ended."""
        try:
            return self._arrived(rows)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be read any more ({error.strerror}): repeat the command, which resumes the run"
            ) from error

    def _arrived(self, rows: int) -> int | None:
        seen = time.monotonic()
        while not self.look(rows * self.length + 1):
            failed = failure_of(self.folder)
            if self._being_filled():
                seen = time.monotonic()
            lost = time.monotonic() - seen > LOST
            if failed and (lost or failed != self.old_failure):
                raise UserError(failed.message)
            require(not lost, f"no process fills {self.folder} any more: repeat the command, which resumes the run")
            time.sleep(LOOK)
        if not self.ended:
            return None
        size = max(0, self.tokens - 1) // self.length
        require(
            size > 0,
            f"data.train: {self.tokens} tokens do not fill one row: data.sequence_length={self.length} needs "
            f"{self.length + 1}; add text or shorten the sequence",
        )
        return size

    def look(self, tokens: int) -> bool:
        """Add the parts that were completed since the last call.

        The method returns whether the token store now has `tokens` tokens or is complete."""
        with self.looking:
            if self.ended or self.tokens >= tokens > 1:
                return True
            ended = (self.folder / MANIFEST).exists()  # checked before the parts, because it is written after all parts
            while (meta := self.folder / part_name(len(self.parts)) / META).exists():
                known = read_meta(meta.parent)
                part = known.part
                self._report_bad(known)
                self._first_token.append(self._first_token[-1] + part.tokens)
                self._first_document.append(self._first_document[-1] + part.documents)
                self.parts.append(part)
            self.ended = ended
            return ended or self.tokens >= tokens

    def _report_bad(self, meta: PartMeta) -> None:
        for line in meta.bad[: max(0, LISTED - self.bad)]:
            say(f"left out: {line}")
        self.bad += meta.counts.get(LEFT_OUT, 0)

    def _being_filled(self) -> bool:
        try:
            with FileLock(lock_of(self.folder), timeout=0):
                return False
        except Timeout:
            return True


def _fill_beside(filling: Filling) -> None:
    """The main function of the filler, which ends when the token store is filled or when the training process ends."""
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(filling.threads))
    open_streams()
    outlive()
    ignore_all()  # the training process handles signals, because it saves a checkpoint first
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def end_with_the_trainer() -> None:
        trainer.join()
        os._exit(0)

    threading.Thread(target=end_with_the_trainer, daemon=True).start()
    try:
        filling.complete()
    except UserError as error:
        recorded = failure_of(filling.folder)
        if recorded is None or recorded.message != str(error):  # otherwise the training process prints the error
            print(f"warning: {error}", file=sys.stderr, flush=True)
