"""Files of every ending, packed or not, give the same records; what is wrong with one is said with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from opt_parallel.data import files
from opt_parallel.data.files import Piece, pieces_of, records_of
from opt_parallel.data.records import Record, sift
from opt_parallel.errors import UserError

ROWS = [{"text": "first, with a comma\nand two lines", "n": "1"}, {"text": 'quotes "here" and déjà vu', "n": "2"}] * 2


def written(ending: str) -> bytes:
    if ending == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if ending == ".json":
        return ("\ufeff \n" + json.dumps(ROWS, indent=1, ensure_ascii=False)).encode()
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(ROWS[0]), delimiter={".csv": ",", ".tsv": "\t"}[ending])
    writer.writeheader()
    writer.writerows(ROWS)
    return buffer.getvalue().encode()


def read(path: Path) -> list[Record]:
    return [record for piece in pieces_of(path, "key", cut=True) for record in of_piece(piece, "text")]


def of_piece(piece: Piece, text_field: str) -> Iterator[Record]:
    return sift(records_of(piece, "key", text_field), lambda record: None, None)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress
}  # fmt: skip


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_rows_of_every_kind(tmp_path: Path, ending: str, packed: str) -> None:
    path = tmp_path / f"rows{ending}{packed}"
    path.write_bytes(PACKERS[packed](written(ending)))
    assert [dict(record.fields) for record in read(path)] == ROWS


def test_parquet_and_plain_text(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=3)
    found = read(tmp_path / "rows.parquet")
    assert [dict(record.fields) for record in found] == ROWS
    assert found[3].where == f"key: {tmp_path / 'rows.parquet'}, row 4"
    (tmp_path / "note.md.gz").write_bytes(gzip.compress(b"a note\n"))
    (piece,) = pieces_of(tmp_path / "note.md.gz", "key", cut=True)
    assert [dict(record.fields) for record in of_piece(piece, "body")] == [{"body": "a note\n"}]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_an_array_is_read_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text("[" + ",\n".join(json.dumps(row) for row in ROWS) + "]\n")
    assert [dict(record.fields) for record in read(path)] == ROWS
    path.write_text("[ ]")
    assert read(path) == []


BAD: dict[str, tuple[str, bytes, str]] = {
    "array item": ("a.json", b'[{"text": "a"}, 3]', "a.json, item 2 is a int: each must be an object"),
    "array cut": ("a.json", b'[{"text": "a"}, {"te', "a.json, item 2 is not JSON, or the array does not end"),
    "array no comma": ("a.json", b'[{"text": "a"} {"text": "b"}]', "a.json, item 1 is not JSON"),
    "array and more": ("a.json", b'[{"text": "a"}] x', "a.json: something follows the array"),
    "array bytes": ("a.json", b'[{"text": "\xff"}]', "a.json is not UTF-8 after item 0"),
    "array number": ("a.json", b'[{"n": ' + b"1" * 5000 + b"}]", "a.json, item 1 cannot be read .*: leave it out"),
    "array brackets": ("a.json", b"[" * 100_000, "a.json, item 1 cannot be read .*: leave it out"),
    "number": ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n", "a.jsonl, line 1 cannot be read .*: leave it out"),
    "columns": ("a.csv", b"text,n\na,1\nb\n", "a.csv, line 3 has 1 columns, the first line 2"),
    "names": ("a.csv", b"text,text\na,1\n", "a.csv, line 1: a column's name stands there twice"),
    "quotes": ("a.csv", b'text,n\n"a"b,1\n', "a.csv, line 2 is malformed"),
    "csv bytes": ("a.csv", b"text,n\na,\xff\n", "a.csv, line 2 is not UTF-8"),
    "gzip": ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is no whole .gz file"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(written(".jsonl"))[:-12], "a.jsonl.gz is no whole .gz file"),
    "xz": ("a.txt.xz", lzma.compress(b"text" * 99)[:-30], "a.txt.xz is no whole .xz file"),
    "parquet": ("a.parquet", b"PAR1 and nothing", "a.parquet is no whole parquet file"),
    "packed parquet": ("a.parquet.gz", b"", "a.parquet.gz: parquet is compressed within: unpack it"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, mistake: str) -> None:
    name, content, message = BAD[mistake]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)
