"""The mixture: exact shares at every position, a pure function, each source gone through in its own epochs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from stores import counting_rows, ids_of

from opt_parallel.data.samples.mixture import Mixture, Source, cycle_of, turns_of
from opt_parallel.data.samples.order import Shuffled
from opt_parallel.data.samples.samples import Rows
from opt_parallel.runtime.errors import UserError

LENGTH = 4
WEIGHTS = {"web": Fraction("0.6"), "books": Fraction("0.3"), "code": Fraction("0.1")}


def three(folder: Path, seed: int = 3) -> Mixture:
    """Sources of 100, 70 and 17 rows: 400 samples are over two epochs of the last."""
    sources = []
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        rows = counting_rows(folder / name, (100, 70, 17)[number], LENGTH)
        sources.append(Source(name, weight, rows, Shuffled(f"{seed} {name}", len(rows))))
    return Mixture(sources)


@pytest.mark.parametrize(
    "weights",
    [
        ["1"],
        ["1", "1"],
        ["0.7", "0.2", "0.1"],
        ["1", "99"],
        ["5", "3", "3", "2", "1", "1", "1"],
        ["0.333", "2"],
        ["1", "7", "9", "12"],
        ["11", "11", "3"],
    ],
)
def test_shares_are_exact_to_one_sample_everywhere(weights: list[str]) -> None:
    """Even to Tijdeman's bound for k sources, 1 − 1 / (2k − 2)."""
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    turns = cycle_of(turns_of([Fraction(weight) for weight in weights]))
    had, most = [0] * len(weights), 1 - Fraction(1, max(2, 2 * len(weights) - 2))
    for position, source in enumerate(turns, start=1):
        had[source] += 1
        assert all(abs(taken - position * share) <= most for taken, share in zip(had, shares, strict=True))
    assert had == turns_of([Fraction(weight) for weight in weights])


def test_weights_that_never_come_out_even() -> None:
    with pytest.raises(UserError, match=r"weights 0.1234567, 0.7654321 need a cycle of .* fewer digits"):
        turns_of([Fraction("0.1234567"), Fraction("0.7654321")])


def test_places_are_counted_without_walking_there(tmp_path: Path) -> None:
    mixture, had = three(tmp_path), [0, 0, 0]
    for position in range(100):
        source, own = mixture.locate(position)
        assert own == had[source]
        assert mixture.taken(position) == dict(zip(WEIGHTS, had, strict=True))
        had[source] += 1
    far = 10**12 + 7
    assert sum(mixture.taken(far).values()) == far
    assert all(abs(mixture.taken(far)[name] - far * weight) < 1 for name, weight in WEIGHTS.items())


def test_each_source_has_epochs_of_its_own(tmp_path: Path) -> None:
    mixture = three(tmp_path)
    seen: dict[str, list[int]] = {name: [] for name in WEIGHTS}
    for position in range(400):
        number, _ = mixture.locate(position)
        source = mixture.sources[number]
        seen[source.name].append(int(mixture.sample(position).ids[0]) // LENGTH)
    assert {name: len(rows) for name, rows in seen.items()} == {"web": 240, "books": 120, "code": 40}
    for name, size in (("web", 100), ("books", 70), ("code", 17)):
        for epoch in range(len(seen[name]) // size):
            rows = seen[name][epoch * size : (epoch + 1) * size]
            assert sorted(rows) == list(range(size))
            assert rows != sorted(rows)
    assert seen["code"][:17] != seen["code"][17:34]
    assert mixture.epochs(400) == {"web": 2.4, "books": pytest.approx(120 / 70), "code": pytest.approx(40 / 17)}


def test_the_first_400_samples_are_the_same_in_every_layout_and_after_a_resume(tmp_path: Path) -> None:
    mixture = three(tmp_path)
    straight = ids_of(mixture, 1, 1, 0, 400)
    assert sorted(straight) == list(range(400))
    for data in (1, 2, 4):
        for micro in (1, 2, 4):
            assert ids_of(mixture, data, micro, 0, 400) == straight
    again = three(tmp_path / "again")  # another process, which knows the position alone
    resumed = ids_of(again, 2, 2, 208, 400) | ids_of(again, 4, 2, 0, 208, step=8)
    assert resumed == straight
    assert ids_of(three(tmp_path / "other", seed=4), 1, 1, 0, 400) != straight


def test_one_source_is_the_plain_order(tmp_path: Path) -> None:
    rows: Rows = counting_rows(tmp_path, 20, LENGTH)
    order = Shuffled(7, 20)
    mixture = Mixture([Source("train", Fraction(1), rows, order)])
    ids = [int(mixture.sample(position).ids[0]) // LENGTH for position in range(50)]
    assert ids == [order.sample_at(position) for position in range(50)]
    assert torch.tensor(ids[:20]).sort().values.tolist() == list(range(20))


def test_what_a_run_is_made_of(tmp_path: Path) -> None:
    assert [line.split() for line in three(tmp_path).summary(400).split("\n")] == [
        ["source", "share", "samples", "epochs"],
        ["web", "60.00%", "240", "2.40"],
        ["books", "30.00%", "120", "1.71"],
        ["code", "10.00%", "40", "2.35"],
    ]
