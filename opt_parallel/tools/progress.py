"""Sources of weights for commands: one shows on a terminal how far it has read, and one reads ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


@contextmanager
def ahead(source: Source, parameters: Iterable[tuple[str, Shard]]) -> Iterator[Source]:
    """A source that returns `parameters` in their order. It reads the next one while the caller uses the last one."""
    following = iter(parameters)
    with ThreadPoolExecutor(1) as thread:

        def start() -> tuple[str, Future[Tensor]] | None:
            parameter = next(following, None)
            return (parameter[0], thread.submit(source, *parameter)) if parameter else None

        reading = start()

        def read(name: str, shard: Shard) -> Tensor:
            nonlocal reading
            assert reading is not None
            assert reading[0] == name, f"{name} is not the next of `parameters`"
            values, reading = reading[1].result(), start()
            return values

        yield read
