"""The shuffled stream: every sample once an epoch, a pure function of seed and position."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from opt_parallel.data.samples.order import sample_at


def epoch(seed: int, number: int, size: int) -> list[int]:
    return [sample_at(seed, number * size + place, size) for place in range(size)]


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 99, 100, 101, 997, 1000])
def test_an_epoch_holds_every_sample_once(size: int) -> None:
    for number in (0, 1, 7):
        assert sorted(epoch(3, number, size)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch(seed, number, 100) for seed in range(3) for number in range(3)]
    for one, other in itertools.combinations(orders, 2):
        agreeing = sum(a == b for a, b in zip(one, other, strict=True))
        assert agreeing < 10  # 1 expected of two random orders


def test_looks_uniform() -> None:
    size = 2000
    order = epoch(5, 0, size)
    displacement = sum(abs(place - sample) for place, sample in enumerate(order)) / size
    assert displacement == pytest.approx(size / 3, rel=0.05)
    steps = Counter((b - a) % size for a, b in itertools.pairwise(order))
    assert max(steps.values()) < 10  # neighbours stand in no fixed relation


def test_all_orders_of_three_come_about_equally_often() -> None:
    seen = Counter(tuple(epoch(1, number, 3)) for number in range(600))
    assert len(seen) == 6
    assert min(seen.values()) > 60
    assert max(seen.values()) < 140


def test_far_positions_cost_no_more() -> None:
    assert 0 <= sample_at(1, 10**18 + 7, 10**12) < 10**12


def test_the_order_of_old_runs_never_changes() -> None:
    assert epoch(1, 0, 10) == [6, 2, 7, 5, 9, 8, 1, 3, 4, 0]
    far = [sample_at(1234, position, 1_000_003) for position in (0, 1, 2, 1_000_003, 10**9)]
    assert far == [817087, 39336, 848693, 679214, 486324]
