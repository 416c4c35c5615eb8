"""Parquet: every type of text, the names of classes, damage, bombs, and rows of which one is bad."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from opt_parallel.data.text import parquet as ours
from opt_parallel.data.text import unpacking
from opt_parallel.data.text.files import pieces_of, records_of
from opt_parallel.data.text.parquet import class_names
from opt_parallel.data.text.records import BadRecord, Record, sift
from opt_parallel.runtime.errors import UserError


def write(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    found = [item for piece in pieces_of(path, "key", cut=True) for item in records_of(piece, "key", "text")]
    return [dict(record.fields) for record in sift(found, lambda record: None, None)]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary(),
        pyarrow.binary_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)  # fmt: skip
def test_text_of_every_type(tmp_path: Path, kind: pyarrow.DataType) -> None:
    texts = pyarrow.array(["one", "déjà vu", None])
    column = texts.dictionary_encode() if pyarrow.types.is_dictionary(kind) else texts.cast(kind)
    path = write(tmp_path / "a.PARQUET", {"text": column})
    assert [row["text"] for row in read(path)] == ["one", "déjà vu", None]


def test_bytes_within_lists_and_what_is_no_text(tmp_path: Path) -> None:
    chat = [[{"role": b"user", "content": "né".encode()}]]
    path = write(tmp_path / "a.parquet", {"messages": chat, "picture": [b"\xff\xd8\xff"], "fixed": [b"abcd"]})
    assert read(path) == [
        {"messages": [{"role": "user", "content": "né"}], "picture": b"\xff\xd8\xff", "fixed": "abcd"}
    ]


def test_a_row_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pyarrow.array([b"one", b"\xff", b"three"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    path = write(tmp_path / "a.parquet", {"text": text})
    (piece,) = pieces_of(path, "key", cut=True)
    found = list(records_of(piece, "key", "text"))
    assert [item.fields["text"] for item in found if isinstance(item, Record)] == ["one", "three"]
    (bad,) = (item for item in found if isinstance(item, BadRecord))
    assert str(bad).startswith(f"key: {path}, row 2 is not UTF-8")


def test_empty_ones_are_empty(tmp_path: Path) -> None:
    assert read(write(tmp_path / "rows.parquet", {"text": pyarrow.array([], pyarrow.string())})) == []
    with parquet.ParquetWriter(tmp_path / "groups.parquet", pyarrow.schema([("text", pyarrow.string())])):
        pass
    assert read(tmp_path / "groups.parquet") == []


def features(**columns: Any) -> dict[bytes, bytes]:
    """As `datasets` writes them into a schema."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def test_names_of_classes(tmp_path: Path) -> None:
    names = ["negative", "neutral", "positive"]
    one = {"names": names, "_type": "ClassLabel"}
    table = pyarrow.table({"label": [2, 0, -1, 7], "labels": [[0, 2], [], None, [1]], "n": [1, 2, 3, 4]})
    told = features(label=one, labels={"feature": one, "_type": "List"}, n={"dtype": "int64", "_type": "Value"})
    parquet.write_table(table.replace_schema_metadata(told), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        {"label": "positive", "labels": ["negative", "positive"], "n": 1},
        {"label": "negative", "labels": [], "n": 2},
        {"label": None, "labels": None, "n": 3},
        {"label": 7, "labels": ["neutral"], "n": 4},
    ]
    assert ours.class_names_in(tmp_path / "a.parquet", "") == {"label": names, "labels": names}


@pytest.mark.parametrize("told", [b"[" * 9999, b"3", b'{"info": 3}', b'{"info": {"features": [3]}}', b"\xff"])
def test_what_a_schema_tells_that_is_no_features(tmp_path: Path, told: bytes) -> None:
    table = pyarrow.table({"text": ["a"]}).replace_schema_metadata({b"huggingface": told})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"text": "a"}]
    assert class_names({"a": 3, "b": {"_type": "ClassLabel"}, "c": {"_type": "ClassLabel", "names": [3]}}) == {}


def test_damage_anywhere_is_an_error(tmp_path: Path) -> None:
    """With checksums every bit of a page counts."""
    rows = [f"row {number} {random.Random(number).random()}" for number in range(200)]
    path = write(tmp_path / "a.parquet", {"text": rows}, write_page_checksum=True, compression="none")
    whole, bits = path.read_bytes(), random.Random(2)
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a.parquet is not a complete parquet file \("):
            read(path)
    for _ in range(40):
        damaged, bit = bytearray(whole), bits.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert [row["text"] for row in read(path)] == rows
        except UserError as error:
            assert "a.parquet" in str(error)  # noqa: PT017


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes that say a long text a million times, or a page that is packed well."""
    monkeypatch.setattr(unpacking, "ALWAYS_ALLOWED", 1 << 20)
    many = pyarrow.array(["a long text " * 100]).dictionary_encode().take(pyarrow.array([0] * 20000))
    path = write(tmp_path / "rows.parquet", {"text": many})
    with pytest.raises(UserError, match=r"rows.parquet unpacks to over 200 times its size"):
        read(path)
    path = write(tmp_path / "page.parquet", {"text": ["a" * (1 << 22)]}, compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"page.parquet unpacks to over 200 times its size"):
        pieces_of(path, "key", cut=True)
