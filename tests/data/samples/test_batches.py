"""Batches: the same samples at a position of the run in every layout, and validation that sees each sample once."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import counting_rows, feed_of, store_of

from opt_parallel.config.model import IGNORED
from opt_parallel.data.samples.batches import Feed, Loader, validation_batches
from opt_parallel.data.samples.order import sample_at
from opt_parallel.data.samples.samples import Batch, Rows, Sample, collate
from opt_parallel.runtime.clock import Clock

LENGTH = 4
CPU = torch.device("cpu")


def by_ordinal(batches: list[Batch]) -> dict[int, list[int]]:
    return {
        int(sample): ids.tolist() for batch in batches for sample, ids in zip(batch.samples, batch.ids, strict=True)
    }


@pytest.mark.parametrize(("micro", "data"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8), (2, 4)])
def test_a_step_is_the_same_samples_in_every_layout(micro: int, data: int, tmp_path: Path) -> None:
    rows = counting_rows(tmp_path, 20, LENGTH)
    feeds = [feed_of(rows, 7, 8, micro, rank, data) for rank in range(data)]
    for start in (0, 8, 16, 5):  # 16 to 23 crosses into the next epoch; 5 is no multiple of the step
        batches = [batch for feed in feeds for batch in feed.at(start)]
        expected = {
            ordinal: [sample_at(7, ordinal, 20) * LENGTH + place for place in range(LENGTH)]
            for ordinal in range(start, start + 8)
        }
        assert by_ordinal(batches) == expected
        assert all(len(batch.ids) == micro for batch in batches)


def test_micro_batches_alternate_between_ranks(tmp_path: Path) -> None:
    feed = feed_of(counting_rows(tmp_path, 20, LENGTH), 7, 8, 2, data_rank=1, data_size=2)
    assert [batch.samples.tolist() for batch in feed.at(16)] == [[18, 19], [22, 23]]


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    (batch,) = feed_of(counting_rows(tmp_path, 3, LENGTH), 1, 3, 3).at(0)
    assert torch.equal(batch.labels, batch.ids + 1)
    assert batch.ids.shape == (3, LENGTH)
    assert batch.ids.dtype == batch.labels.dtype == batch.samples.dtype == torch.int64
    assert batch.positions is None
    assert batch.segments is None
    assert batch.targets == batch.tokens == 3 * LENGTH


def test_moving_a_batch(tmp_path: Path) -> None:
    batch = next(validation_batches(counting_rows(tmp_path, 2, LENGTH), 2, 0, 1))
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.labels.device.type == moved.samples.device.type == "meta"
    assert moved.positions is None
    assert batch.ids.device.type == "cpu"


def test_samples_of_several_lengths_are_padded() -> None:
    short = Sample(np.array([5, 6]), np.array([6, IGNORED]))
    long = Sample(np.array([7, 8, 9]), np.array([8, 9, 2]), np.array([1, 1, 2]), np.array([0, 1, 0]))
    batch = collate([short, long], range(3, 5), pad_token_id=1)
    assert batch.ids.tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch.labels.tolist() == [[6, IGNORED, IGNORED], [8, 9, 2]]
    assert batch.segments is not None
    assert batch.positions is not None
    assert batch.segments.tolist() == [[1, 1, 0], [1, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, -1], [0, 1, 0]]
    assert (batch.targets, batch.tokens, batch.samples.tolist()) == (4, 5, [3, 4])


def test_labels_of_whole_samples_stay_as_they_are() -> None:
    ids = np.array([5, 6])
    one = collate([Sample(ids, np.array(3)), Sample(ids, np.array(IGNORED))], range(2), 1)
    assert (one.labels.tolist(), one.targets, one.tokens) == ([3, IGNORED], 1, 4)
    nan = np.full(2, np.nan, np.float32)
    several = collate([Sample(ids, np.ones(2, np.float32)), Sample(ids, nan)], range(2), 1)
    assert several.labels.shape == (2, 2)
    assert several.targets == 1


@pytest.mark.parametrize(("size", "micro", "data"), [(1, 1, 1), (5, 2, 1), (7, 2, 2), (1, 2, 4), (8, 2, 2)])
def test_validation_sees_each_sample_once_and_ranks_keep_step(size: int, micro: int, data: int, tmp_path: Path) -> None:
    rows = counting_rows(tmp_path, size, LENGTH)
    ranks = [list(validation_batches(rows, micro, rank, data)) for rank in range(data)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.ids.shape == (micro, LENGTH) for batches in ranks for batch in batches)
    counted = [
        (int(sample), row[0])
        for batches in ranks
        for batch in batches
        for sample, row, labels in zip(batch.samples, batch.ids.tolist(), batch.labels, strict=True)
        if not bool((labels == IGNORED).all())
    ]
    assert sorted(counted) == [(row, row * LENGTH) for row in range(size)]
    assert sum(batch.targets for batches in ranks for batch in batches) == size * LENGTH


def test_unigram_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt_parallel.data.samples.samples.TOKENS_READ", 3)
    assert counting_rows(tmp_path / "a", 5, LENGTH).unigram_entropy == pytest.approx(np.log(5 * LENGTH))
    stream = [9, 1, 1, 1, 2, 1, 1, 1, 2, 0, 0, 0, 0, 7]  # the first token is no target, the last fills no row
    share = np.array([6, 2, 4]) / 12
    rows = Rows(store_of(tmp_path / "b", [[stream]]), LENGTH)
    assert rows.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())


def loader_of(feed: Feed, clock: Clock, stop: int) -> list[list[Batch]]:
    loader = Loader(feed, clock, stop, CPU)
    steps = [loader.next() for _ in range(stop - clock.step)]
    loader.close()
    return steps


def test_a_loader_gives_the_feeds_batches_in_order(tmp_path: Path) -> None:
    feed = feed_of(counting_rows(tmp_path, 20, LENGTH), 7, 8, 2)
    for clock, stop in ((Clock(), 7), (Clock(step=3, samples=5), 4)):
        steps = loader_of(feed, clock, stop)
        expected = [feed.at(clock.samples + 8 * step) for step in range(stop - clock.step)]
        assert [by_ordinal(step) for step in steps] == [by_ordinal(step) for step in expected]


def test_a_loader_reads_ahead_and_no_further_than_the_end(tmp_path: Path) -> None:
    rows, asked = counting_rows(tmp_path, 20, LENGTH), threading.Semaphore(0)
    numbers: list[int] = []

    class Watched(Rows):
        def sample(self, number: int) -> Sample:
            numbers.append(number)
            asked.release()
            return super().sample(number)

    feed = feed_of(Watched(rows.store, LENGTH), 7, 2, 1)
    loader = Loader(feed, Clock(), 5, CPU)
    for _ in range(4):  # two steps of two samples, before anybody asks
        assert asked.acquire(timeout=30)
    assert not asked.acquire(timeout=0.3)
    for _ in range(5):
        loader.next()
    loader.close()
    assert numbers == [sample_at(7, position, 20) for position in range(10)]


def test_a_loader_that_is_closed_early_ends_its_thread(tmp_path: Path) -> None:
    loader = Loader(feed_of(counting_rows(tmp_path, 20, LENGTH), 7, 2, 1), Clock(), 1000, CPU)
    (thread,) = [each for each in threading.enumerate() if each.name == "loader"]
    loader.next()
    loader.close()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_what_fails_in_the_loader_fails_in_the_loop(tmp_path: Path) -> None:
    rows = counting_rows(tmp_path, 20, LENGTH)
    (tmp_path / "part-00002" / "ids.bin").write_bytes(b"")
    loader = Loader(feed_of(rows, 7, 20, 20), Clock(), 3, CPU)
    with pytest.raises(Exception, match=r"ids.bin ends early"):
        loader.next()
    loader.close()
