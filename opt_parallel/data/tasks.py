"""What each task makes of its stores: samples, and the mixture of the training sources."""

from __future__ import annotations

from pathlib import Path

from opt_parallel.clock import Clock
from opt_parallel.config import Run
from opt_parallel.data.mixture import Mixture, Order, Source
from opt_parallel.data.order import Shuffled, Streamed
from opt_parallel.data.packing import Examples
from opt_parallel.data.prepare import Prepared
from opt_parallel.data.records import LEFT_OUT, LISTED
from opt_parallel.data.resuming import order_of
from opt_parallel.data.samples import Labelled, Rows, Samples
from opt_parallel.data.store import TokenStore
from opt_parallel.data.streaming import BLOCK, Filling, GrowingStore, whole_parts
from opt_parallel.log import say
from opt_parallel.shapes import require
from opt_parallel.task_config import Task


def open_samples(run: Run, folder: Path, key: str) -> Samples:
    """The samples that the run's task cuts from a store. Raises: UserError if there is not one."""
    store, length = TokenStore(folder), run.data.sequence_length
    if run.task.name is Task.finetune:
        examples = Examples(store, length, run.task.packing)
        say(f"{key}: {examples.words()}")
        return examples
    if run.task.name is Task.classify:
        return Labelled(store)
    samples = Rows(store, length)
    require(
        len(samples) > 0,
        f"{key}: {store.tokens} tokens do not fill one row: data.sequence_length={length} needs {length + 1}; "
        "bring more text or shorten the sequence",
    )
    return samples


def open_mixture(run: Run, prepared: Prepared, clock: Clock) -> Mixture:
    """The training sources, each in a seeded order of its own, for a run that stands at `clock`; streams are being
    filled from now on, and have their first samples. Raises: UserError."""
    mixture, fillings = _mixture(run, prepared, clock)
    for filling in fillings:
        filling.start()
    for source in mixture.sources:
        source.order.sample_at(0)  # so that a stream that gives nothing is known of before any rank waits for it
    return mixture


def fill_streams(run: Run, prepared: Prepared, clock: Clock) -> None:
    """Fill the stores of streams as far as a run that stands at `clock` reads them. Raises: UserError."""
    for filling in _mixture(run, prepared, clock)[1]:
        filling.complete()
        metas = whole_parts(filling.folder)
        documents, tokens = (sum(getattr(meta.part, name) for meta in metas) for name in ("documents", "tokens"))
        bad = sum(meta.counts.get(LEFT_OUT, 0) for meta in metas)
        left_out = f", {bad:,} {LEFT_OUT}" if bad else ""
        say(f"{filling.material.corpus.key}: {documents:,} documents, {tokens:,} tokens{left_out}; in {filling.folder}")
        for line in [line for meta in metas for line in meta.bad][:LISTED]:
            say(f"left out: {line}")


def _mixture(run: Run, prepared: Prepared, clock: Clock) -> tuple[Mixture, list[Filling]]:
    sources: list[Source] = []
    length = run.data.sequence_length
    for source in prepared.train:
        order = order_of(clock, source.name, alone=len(prepared.train) == 1)
        seed = f"{run.seed} {order}" if order else run.seed
        samples: Samples
        ordered: Order
        if source.stream is not None:
            store = GrowingStore(source.store, source.stream.encoder.columns, length)
            samples, ordered = Rows(store, length), Streamed(seed, BLOCK, store.arrived)
        else:
            samples = open_samples(run, source.store, "data.train")
            ordered = Shuffled(seed, len(samples))
        sources.append(Source(source.name, source.weight, samples, ordered, clock.taken.get(source.name, 0)))
    mixture = Mixture(sources, clock.mixed)
    taken = mixture.taken(run.samples_at_end(clock))
    fillings = [
        Filling(each.store, each.stream, -(-taken[each.name] // BLOCK) * BLOCK * length + 1, run.data.workers)
        for each in prepared.train
        if each.stream is not None
    ]
    return mixture, fillings


def open_validation(run: Run, prepared: Prepared) -> Samples | None:
    """What the run is validated on, if anything. Raises: UserError."""
    key = "data.held_out" if run.holds_out else "data.validation"
    return open_samples(run, prepared.validation, key) if prepared.validation else None
