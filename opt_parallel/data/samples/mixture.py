"""Which source, and which of its samples, stands at a position of the run: a pure function, however many sources.

Sources take turns in a fixed cycle in which each stands as often as its weight says. The cycle is Tijdeman's solution
of the chairman assignment problem (1980, Discrete Mathematics 32): among the first n samples of the run every source
has its share of n, off by less than one sample, for every n.
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
    """The order in which a source's samples come, epoch after epoch."""

    def sample_at(self, position: int) -> int:
        """The number of the sample at a position of this source's own stream."""
        ...

    def epoch_at(self, position: int) -> float:
        """How often the source has been gone through before `position`."""
        ...


@dataclass(frozen=True)
class Cycle:
    """Whose turn it is among sources of these weights, over and over."""

    weights: tuple[Fraction, ...]

    def place(self, turn: int) -> tuple[int, int]:
        """The number of the source whose turn it is, and how many turns it had before."""
        turns, before, counts = self._laid_out
        cycle, place = divmod(turn, len(turns))
        number = int(turns[place])
        return number, cycle * counts[number] + int(before[place])

    def taken(self, turns: int) -> list[int]:
        """Of each source, its turns among the first `turns`."""
        order, _, counts = self._laid_out
        cycles, rest = divmod(turns, len(order))
        counted = np.bincount(order[:rest], minlength=len(counts)).tolist()
        return [cycles * count + more for count, more in zip(counts, counted, strict=True)]

    @cached_property
    def _laid_out(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Whose turn it is at each place of the cycle, how often it was its turn before, and how often in all."""
        counts = turns_of(self.weights)
        turns = np.array(cycle_of(counts), np.int32)
        before = np.empty(len(turns), np.int64)
        for number, count in enumerate(counts):
            before[turns == number] = np.arange(count)
        return turns, before, counts


@dataclass(frozen=True)
class Source:
    """A part of the training data. Its samples come in `order`; `weight` is its share among the sources. `taken`: the
    samples that it gave before the mixture began."""

    name: str
    weight: Fraction
    samples: Samples
    order: Order
    taken: int = 0


@dataclass(frozen=True)
class Mixture:
    """All sources, as one endless stream of samples, from the run's sample `begins` on."""

    sources: Sequence[Source]
    begins: int = 0

    def place(self, position: int) -> tuple[int, int]:
        """The number of the source whose turn it is at `position`, and how many of its samples came before."""
        number, own = self._cycle.place(position - self.begins)
        return number, self.sources[number].taken + own

    def sample(self, position: int) -> Sample:
        """The sample at `position` of the run."""
        number, own = self.place(position)
        source = self.sources[number]
        return source.samples.sample(source.order.sample_at(own))

    def taken(self, position: int) -> dict[str, int]:
        """Of each source, the samples among the first `position` of the run."""
        turns = self._cycle.taken(position - self.begins)
        return {source.name: source.taken + own for source, own in zip(self.sources, turns, strict=True)}

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been gone through before `position` of the run."""
        taken = self.taken(position)
        return {source.name: source.order.epoch_at(taken[source.name]) for source in self.sources}

    def words(self, position: int) -> str:
        """What the first `position` samples of the run are made of, in a line for each source."""
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
    """How often each source stands in the shortest cycle of just these shares.

    Raises: UserError if that is too long to be laid out."""
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    length = math.lcm(*(share.denominator for share in shares))
    if length > LONGEST_CYCLE:
        said = ", ".join(str(float(weight)) for weight in weights)
        raise UserError(
            f"data.train: weights {said} come out even only every {length:,} samples: write them with fewer digits"
        )
    return [int(share * length) for share in shares]


def cycle_of(counts: Sequence[int]) -> list[int]:
    """The turns of a cycle in which source k stands `counts`[k] times, as evenly as can be.

    At turn n (from 1), source k is behind its due by n·counts[k] − length·(turns it had), in units of 1/length turns.
    Of those that are behind by at least length / (2·sources − 2), the one whose turn is due first gets it."""
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
