"""What each task makes of its stores: samples, and the mixture of the training sources."""

from __future__ import annotations

from pathlib import Path

from opt_parallel.config import Run
from opt_parallel.data.labelled import Labelled
from opt_parallel.data.mixture import Mixture, Source
from opt_parallel.data.order import Shuffled
from opt_parallel.data.prepare import Prepared
from opt_parallel.data.samples import Rows, Samples
from opt_parallel.data.store import TokenStore
from opt_parallel.shapes import require
from opt_parallel.task_config import Task


def open_samples(run: Run, folder: Path, key: str) -> Samples:
    """The samples that the run's task cuts from a store. Raises: UserError if there is not one."""
    store, length = TokenStore(folder), run.data.sequence_length
    if run.task.name is Task.classify:
        return Labelled(store)
    samples = Rows(store, length)
    require(
        len(samples) > 0,
        f"{key}: {store.tokens} tokens do not fill one row: data.sequence_length={length} needs {length + 1}; "
        "bring more text or shorten the sequence",
    )
    return samples


def open_mixture(run: Run, prepared: Prepared) -> Mixture:
    """The training sources, each in a seeded order of its own. Raises: UserError."""
    sources = []
    for source in prepared.train:
        samples = open_samples(run, source.store, "data.train")
        seed = run.seed if len(prepared.train) == 1 else f"{run.seed} {source.name}"
        sources.append(Source(source.name, source.weight, samples, Shuffled(seed, len(samples))))
    return Mixture(sources)


def open_validation(run: Run, prepared: Prepared) -> Samples | None:
    """What the run is validated on, if anything. Raises: UserError."""
    return open_samples(run, prepared.validation, "data.validation") if prepared.validation else None
