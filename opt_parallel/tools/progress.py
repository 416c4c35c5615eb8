"""Shows on a terminal how far a command has read a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from tqdm import tqdm

from opt_parallel.parallel.shard import Shard, Source


@contextmanager
def shown(what: str, weights: Source, elements: int) -> Iterator[Source]:
    """A source of the same `weights`. If standard error is a terminal, it shows a bar for `elements` elements."""
    with tqdm(desc=what, total=elements, unit=" weights", unit_scale=True, leave=False, disable=None) as bar:

        def source(name: str, shard: Shard) -> Tensor:
            values = weights(name, shard)
            bar.update(values.numel())
            return values

        yield source
