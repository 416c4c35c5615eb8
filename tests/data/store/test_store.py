"""The token store: documents in parts, read at any place as if they were one stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stores import store_of

from opt_parallel.data.encode.columns import LENGTHS, Column, Encoded, columns_of, ids_column
from opt_parallel.data.store.store import PartWriter, TokenStore, write_manifest
from opt_parallel.runtime.errors import UserError

PARTS = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8, 9, 10, 11]]]


def test_any_stretch_of_tokens_across_parts(tmp_path: Path) -> None:
    store = store_of(tmp_path, PARTS)
    assert (store.tokens, store.documents) == (11, 5)
    for start in range(12):
        for stop in range(start, 12):
            assert store.of_tokens("ids", start, stop).tolist() == list(range(start + 1, stop + 1))
    assert store.of_documents("lengths").tolist() == [3, 1, 2, 1, 4]
    assert store.of_documents("lengths", 1, 4).tolist() == [1, 2, 1]


def test_an_empty_part_is_passed_over(tmp_path: Path) -> None:
    store = store_of(tmp_path, [[[1]], [], [[2, 3]]])
    assert store.of_tokens("ids", 0, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("tokens", "dtype"), [(256, "uint8"), (257, "uint16"), (1 << 16, "uint16"), (65537, "uint32")])
def test_ids_in_the_smallest_type(tokens: int, dtype: str, tmp_path: Path) -> None:
    assert ids_column(tokens).dtype == dtype
    store = store_of(tmp_path, [[[tokens - 1, 0]]], tokens)
    assert store.of_tokens("ids", 0, 2).tolist() == [tokens - 1, 0]
    assert (tmp_path / "part-00000" / "ids.bin").stat().st_size == 2 * np.dtype(dtype).itemsize


def test_columns_of_an_encoders_own(tmp_path: Path) -> None:
    columns = {
        "ids": ids_column(100), "lengths": LENGTHS,
        "targets": Column("uint8", per_token=True), "labels": Column("float32", width=2),
    }  # fmt: skip
    writer = PartWriter(tmp_path / "part-00000", columns)
    for number in range(2):
        own = {"targets": np.array([0, 1, 1]), "labels": np.array([[number, 0.5], [2.0, number]])}
        writer.write(Encoded({**columns_of([[1, 2], [3]]), **own}))
    write_manifest(tmp_path, columns, [writer.close()], {})
    store = TokenStore(tmp_path)
    assert store.of_tokens("targets", 1, 5).tolist() == [1, 1, 0, 1]
    assert store.of_documents("labels", 1, 3).tolist() == [[2.0, 0.0], [1.0, 0.5]]


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"store.json cannot be read \(No such file.*; remove it, and the next start builds"
    ):
        TokenStore(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"store.json has the wrong content .*; remove it, "):
        TokenStore(tmp_path)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, PARTS)
    (tmp_path / "part-00001" / "ids.bin").write_bytes(b"\x05")
    with pytest.raises(UserError, match=r"part-00001/ids.bin ends early; remove"):
        store.of_tokens("ids", 0, 6)
