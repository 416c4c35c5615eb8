"""Opens the token stores of a run, and returns their samples and the mixture of the training sources."""

from __future__ import annotations

from pathlib import Path

from opt_parallel.config.model import Labels
from opt_parallel.config.run import Run
from opt_parallel.data.kinds import KINDS
from opt_parallel.data.prepare import Prepared
from opt_parallel.data.resuming import order_of
from opt_parallel.data.samples.mixture import Mixture, Order, Source
from opt_parallel.data.samples.order import Shuffled, Streamed
from opt_parallel.data.samples.samples import Rows, Samples
from opt_parallel.data.store.store import TokenStore
from opt_parallel.data.store.stream import BLOCK, Filling, GrowingStore
from opt_parallel.data.text.records import LEFT_OUT
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.log import say


def open_samples(run: Run, folder: Path, key: str, labels: Labels | None) -> Samples:
    """The samples of the token store in `folder` for the run's task. Raises: UserError if there are no samples.

    `key` names the token store in messages. `labels` are the labels of a classifier."""
    store = TokenStore(folder, run.model.vocab_size)
    return KINDS[run.task.name].samples(run.task, run.data.sequence_length, store, key, labels)


def open_mixture(run: Run, prepared: Prepared, clock: Clock) -> Mixture:
    """The mixture of the training sources for a run at the position `clock`. Raises: UserError.

    The function starts to fill the token stores of streams, and waits for their first samples."""
    mixture, fillings = _mixture(run, prepared, clock)
    for filling in fillings:
        filling.start()
    for source in mixture.sources:
        source.order.sample_at(0)  # an empty stream raises an error now, before other ranks wait for this rank
    return mixture


def fill_streams(run: Run, prepared: Prepared, clock: Clock) -> dict[str, TokenStore]:
    """Fill the token stores of streams with the text that a run at the position `clock` reads. Raises: UserError."""
    stores: dict[str, TokenStore] = {}
    for filling in _mixture(run, prepared, clock)[1]:
        filling.complete()
        columns, key = filling.recipe.encoder.columns, filling.recipe.corpus.key
        store = GrowingStore(filling.folder, columns, run.data.sequence_length, run.model.vocab_size)
        store.look(tokens=1)
        left_out = f", {store.bad:,} {LEFT_OUT}" if store.bad else ""
        say(f"{key}: {store.documents:,} documents, {store.tokens:,} tokens{left_out}; in {filling.folder}")
        stores[f"{key} ({filling.folder.name})"] = store
    return stores


def _mixture(run: Run, prepared: Prepared, clock: Clock) -> tuple[Mixture, list[Filling]]:
    sources: list[Source] = []
    length = run.data.sequence_length
    for source in prepared.train:
        order = order_of(clock, source.name, alone=len(prepared.train) == 1)
        seed = f"{run.seed} {order}" if order else run.seed
        samples: Samples
        ordered: Order
        if source.stream is not None:
            store = GrowingStore(source.store, source.stream.encoder.columns, length, run.model.vocab_size)
            samples, ordered = Rows(store, length), Streamed(seed, BLOCK, store.arrived)
        else:
            samples = open_samples(run, source.store, "data.train", prepared.labels)
            ordered = Shuffled(seed, min(len(samples), run.data.samples or len(samples)))
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
    """The validation samples, or None if the run has no validation text. Raises: UserError."""
    key = "data.held_out" if run.holds_out else "data.validation"
    return open_samples(run, prepared.validation, key, prepared.labels) if prepared.validation else None
