"""Batches: the same samples at a position of the run in every layout, and validation that sees each block once."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from opt_parallel.data.batches import IGNORED, Batch, Feed, open_blocks, unigram_entropy, validation_batches
from opt_parallel.data.order import sample_at

LENGTH = 4


def store(size: int, dtype: str = "uint16") -> datasets.Dataset:
    """Row i holds i·4 to i·4 + 4, as the preparation cuts a stream of counting numbers."""
    rows = np.arange(size)[:, None] * LENGTH + np.arange(LENGTH + 1)
    features = datasets.Features({"ids": datasets.List(datasets.Value(dtype), length=LENGTH + 1)})
    return datasets.Dataset.from_dict({"ids": rows.tolist()}, features=features)


def by_ordinal(batches: list[Batch]) -> dict[int, list[int]]:
    return {
        int(sample): ids.tolist() for batch in batches for sample, ids in zip(batch.samples, batch.ids, strict=True)
    }


@pytest.mark.parametrize(("micro", "data"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8), (2, 4)])
def test_a_step_is_the_same_samples_in_every_layout(micro: int, data: int) -> None:
    blocks = store(20)
    feeds = [Feed(blocks, 7, 8, micro, rank, data) for rank in range(data)]
    for start in (0, 8, 16, 5):  # 16 to 23 crosses into the next epoch; 5 is no multiple of the step
        batches = [batch for feed in feeds for batch in feed.at(start)]
        expected = {
            ordinal: [sample_at(7, ordinal, 20) * LENGTH + place for place in range(LENGTH)]
            for ordinal in range(start, start + 8)
        }
        assert by_ordinal(batches) == expected
        assert all(len(batch.ids) == micro for batch in batches)


def test_micro_batches_alternate_between_ranks() -> None:
    feed = Feed(store(20), seed=7, global_batch=8, micro_batch=2, data_rank=1, data_size=2)
    assert [batch.samples.tolist() for batch in feed.at(16)] == [[18, 19], [22, 23]]


def test_labels_are_the_next_tokens() -> None:
    (batch,) = Feed(store(3), 1, 3, 3, 0, 1).at(0)
    assert torch.equal(batch.labels, batch.ids + 1)
    assert batch.ids.shape == (3, LENGTH)
    assert batch.ids.dtype == batch.labels.dtype == batch.samples.dtype == torch.int64
    assert batch.positions is None
    assert batch.segments is None
    assert batch.targets == 3 * LENGTH


def test_moving_a_batch() -> None:
    batch = next(validation_batches(store(2), 2, 0, 1))
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.labels.device.type == moved.samples.device.type == "meta"
    assert moved.positions is None
    assert batch.ids.device.type == "cpu"


def test_a_store_on_disk_is_the_same(tmp_path: Path) -> None:
    store(5, "int32").save_to_disk(tmp_path / "blocks")
    ours, theirs = (Feed(blocks, 1, 4, 4, 0, 1).at(0)[0] for blocks in (tmp_path / "blocks", store(5)))
    assert torch.equal(ours.ids, theirs.ids)
    assert len(open_blocks(str(tmp_path / "blocks"))) == 5


@pytest.mark.parametrize(("size", "micro", "data"), [(1, 1, 1), (5, 2, 1), (7, 2, 2), (1, 2, 4), (8, 2, 2)])
def test_validation_sees_each_block_once_and_ranks_keep_step(size: int, micro: int, data: int) -> None:
    ranks = [list(validation_batches(store(size), micro, rank, data)) for rank in range(data)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.ids.shape == (micro, LENGTH) for batches in ranks for batch in batches)
    counted = [
        (int(sample), row[0])
        for batches in ranks
        for batch in batches
        for sample, row, labels in zip(batch.samples, batch.ids.tolist(), batch.labels, strict=True)
        if not bool((labels == IGNORED).all())
    ]
    assert sorted(counted) == [(block, block * LENGTH) for block in range(size)]
    assert sum(batch.targets for batches in ranks for batch in batches) == size * LENGTH


def test_unigram_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opt_parallel.data.batches.ROWS_READ", 2)
    assert unigram_entropy(store(5)) == pytest.approx(np.log(5 * LENGTH))  # each target once
    features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"), length=5)})
    rows = [[9, 1, 1, 1, 2], [9, 1, 1, 1, 2], [9, 1, 1, 1, 2], [9, 0, 0, 0, 0]]
    share = np.array([9, 3, 4]) / 16  # the first token of a row is no target
    expected = -(share * np.log(share)).sum()
    assert unigram_entropy(datasets.Dataset.from_dict({"ids": rows}, features=features)) == pytest.approx(expected)
