"""Maps each position of the run to a source of training text and to a sample of this source, as a pure function.

Sources take turns in a fixed cycle, in proportion to their weights. The cycle is Tijdeman's solution of the chairman
assignment problem (1980, Discrete Mathematics 32). For every n, the number of a source's samples among the first n
samples differs from n times the source's share by less than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np

from opt_parallel.data.samples.samples import Sample, Samples
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import aligned

LONGEST_CYCLE = 100_000


class Order(Protocol):
    """The order of a source's samples over all epochs."""

    def sample_at(self, position: int) -> int:
        """The index of the sample at `position` in the sequence of this source's samples."""
        ...

    def epoch_at(self, position: int) -> float:
        """The number of epochs (with a fraction) of this source before `position`."""
        ...


@dataclass(frozen=True)
class Cycle:
    """The repeating sequence in which sources with these weights take turns."""

    weights: tuple[Fraction, ...]

    def locate(self, turn: int) -> tuple[int, int]:
        """The index of the source that has this turn, and the number of earlier turns of the source."""
        turns, before, counts = self._laid_out
        cycle, offset = divmod(turn, len(turns))
        number = int(turns[offset])
        return number, cycle * counts[number] + int(before[offset])

    def taken(self, turns: int) -> list[int]:
        """The number of turns of each source among the first `turns`."""
        order, _, counts = self._laid_out
        cycles, rest = divmod(turns, len(order))
        counted = np.bincount(order[:rest], minlength=len(counts)).tolist()
        return [cycles * count + more for count, more in zip(counts, counted, strict=True)]

    @cached_property
    def _laid_out(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The turns of a cycle as three arrays.

        The first array is the source of each turn, the second is the number of earlier turns of this source, and the
        third is the number of turns of each source."""
        counts = turns_of(self.weights)
        turns = np.array(cycle_of(counts), np.int32)
        before = np.empty(len(turns), np.int64)
        for number, count in enumerate(counts):
            before[turns == number] = np.arange(count)
        return turns, before, counts


@dataclass(frozen=True)
class Source:
    """A source of training data in a mixture.

    `weight` is the source's share of the samples, relative to the weights of the other sources. `taken` is the number
    of samples of the source that were used before the mixture starts."""

    name: str
    weight: Fraction
    samples: Samples
    order: Order
    taken: int = 0


@dataclass(frozen=True)
class Mixture:
    """An endless sequence of samples from all sources, which starts at the position `start` of the run."""

    sources: Sequence[Source]
    start: int = 0

    def locate(self, position: int) -> tuple[int, int]:
        """The index of the source of the sample at `position` of the run, and the number of its earlier samples."""
        number, own = self._cycle.locate(position - self.start)
        return number, self.sources[number].taken + own

    def sample(self, position: int) -> Sample:
        """The sample at `position` of the run."""
        number, own = self.locate(position)
        source = self.sources[number]
        return source.samples.sample(source.order.sample_at(own))

    def taken(self, position: int) -> dict[str, int]:
        """The number of samples of each source among the first `position` samples of the run."""
        turns = self._cycle.taken(position - self.start)
        return {source.name: source.taken + own for source, own in zip(self.sources, turns, strict=True)}

    def epochs(self, position: int) -> dict[str, float]:
        """The number of epochs of each source before `position` of the run."""
        taken = self.taken(position)
        return {source.name: source.order.epoch_at(taken[source.name]) for source in self.sources}

    def summary(self, position: int) -> str:
        """A table with the share, samples and epochs of each source among the first `position` samples of the run."""
        total = sum((source.weight for source in self.sources), Fraction(0))
        taken, epochs = self.taken(position), self.epochs(position)
        rows = [["source", "share", "samples", "epochs"]]
        for source in self.sources:
            share, passed = float(source.weight / total), epochs[source.name]
            rows.append([source.name, f"{share:.2%}", f"{taken[source.name]:,}", f"{passed:.2f}" if passed else "?"])
        return aligned(rows)

    @cached_property
    def _cycle(self) -> Cycle:
        return Cycle(tuple(source.weight for source in self.sources))


def turns_of(weights: Sequence[Fraction]) -> list[int]:
    """The number of turns of each source in the shortest cycle with exactly these shares.

    Raises: UserError if the cycle is longer than `LONGEST_CYCLE`."""
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    length = math.lcm(*(share.denominator for share in shares))
    if length > LONGEST_CYCLE:
        listed = ", ".join(str(float(weight)) for weight in weights)
        raise UserError(
            f"data.train: the weights {listed} need a cycle of {length:,} samples, over {LONGEST_CYCLE:,}: write the "
            "weights with fewer digits"
        )
    return [int(share * length) for share in shares]


def cycle_of(counts: Sequence[int]) -> list[int]:
    """The source of each turn of a cycle. Source k has `counts`[k] turns, which are spread as evenly as possible.

    At turn n (from 1), source k lags by n·counts[k] − length·(its turns so far), in units of 1/length turns. Among the
    sources that lag by at least length / (2·sources − 2), the source with the earliest deadline gets the turn."""
    length, doubled = sum(counts), max(1, 2 * len(counts) - 2)
    had, turns = [0] * len(counts), []
    for turn in range(1, length + 1):
        behind = [turn * count - length * taken for count, taken in zip(counts, had, strict=True)]
        entitled = [number for number, lag in enumerate(behind) if lag * doubled >= length]

        def due(number: int, behind: list[int] = behind) -> Fraction:
            return Fraction((doubled - 1) * length - doubled * behind[number], counts[number])

        chosen = min(entitled, key=due)
        had[chosen] += 1
        turns.append(chosen)
    return turns
