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

from opt_parallel.data.text import files
from opt_parallel.data.text.files import Piece, numbered, pieces_of, records_of
from opt_parallel.data.text.records import BadRecord, Record, sift
from opt_parallel.runtime.errors import UserError

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
    "array item": ("a.json", b'[{"text": "a"}, 3]', "a.json, item 2 is a int: each item must be an object"),
    "array cut": ("a.json", b'[{"text": "a"}, {"te', "a.json, item 2 is not JSON, or the array does not end"),
    "array no comma": ("a.json", b'[{"text": "a"} {"text": "b"}]', "a.json, item 1 is not JSON"),
    "array and more": ("a.json", b'[{"text": "a"}] x', "a.json: .*after the array"),
    "array bytes": ("a.json", b'[{"text": "\xff"}]', "a.json is not UTF-8 after item 0"),
    "array number": ("a.json", b'[{"n": ' + b"1" * 5000 + b"}]", "a.json, item 1 cannot be read .*: leave it out"),
    "array brackets": ("a.json", b"[" * 100_000, "a.json, item 1 cannot be read .*: leave it out"),
    "number": ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n", "a.jsonl, line 1 cannot be read .*: leave it out"),
    "columns": ("a.csv", b"text,n\na,1\nb\n", "a.csv, line 3 has 1 columns, but the first line has 2"),
    "names": ("a.csv", b"text,text\na,1\n", "a.csv, line 1: the column name 'text' occurs twice"),
    "quotes": ("a.csv", b'text,n\n"a"b,1\n', "a.csv, line 2 is malformed"),
    "csv bytes": ("a.csv", b"text,n\na,\xff\n", "a.csv, line 2 is not UTF-8"),
    "gzip": ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is not a complete .gz file"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(written(".jsonl"))[:-12], "a.jsonl.gz is not a complete .gz file"),
    "xz": ("a.txt.xz", lzma.compress(b"text" * 99)[:-30], "a.txt.xz is not a complete .xz file"),
    "parquet": ("a.parquet", b"PAR1 and nothing", "a.parquet is not a complete parquet file"),
    "packed parquet": ("a.parquet.gz", b"", "a.parquet.gz: parquet has its own compression: unpack it"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, mistake: str) -> None:
    name, content, message = BAD[mistake]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


UTF16 = "a row of text".encode("utf-16")
BAD_TEXT: dict[str, tuple[str, bytes, str]] = {
    "utf-16": ("a.txt", UTF16, "a.txt is not UTF-8 but UTF-16: convert it"),
    "big endian": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "a.jsonl, line 1 contains a NUL byte"),
    "no mark": ("a.txt", "text".encode("utf-16-le"), "a.txt contains a NUL byte, so it is not UTF-8 text: convert it"),
    "zeros after a crash": ("a.txt", b"a text" + bytes(99), "a.txt contains a NUL byte"),
    "utf-16 table": ("a.csv", "text,n\na,1\n".encode("utf-16"), "a.csv, line 1 is not UTF-8 but UTF-16"),
    "latin-1": ("a.txt", "déjà".encode("latin-1"), r"a.txt is not UTF-8 at byte 1 \(0xe9\)"),
    "deep": ("a.jsonl", b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}\n", "line 1 has more than 100 nested"),
    "deep item": ("a.json", b'[{"a": ' + b'{"a": ' * 150 + b"1" + b"}" * 151 + b"]", "item 1 has more than 100"),
    "deeper": ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl, line 1 cannot be read .*: leave it out"),
    "digits": ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "a.jsonl, line 1 cannot be read .*: leave it out"),
    "empty .gz": ("a.txt.gz", b"", r"a.txt.gz is not a complete .gz file \(the file is empty\)"),
    "empty .zst": ("a.jsonl.zst", b"", r"a.jsonl.zst is not a complete .zst file \(the file is empty\)"),
    "a pointer": ("a.md", b"version https://git-lfs.github.com/spec/v1\noid", "a.md is a pointer of Git LFS"),
}


@pytest.mark.parametrize("mistake", BAD_TEXT)
def test_text_that_is_none(tmp_path: Path, mistake: str) -> None:
    name, content, message = BAD_TEXT[mistake]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n", "one\ntwo\nthree\n"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one\\r\\n\\u0000"}\r\n', "one\r\n\0"),  # what JSON says is meant
        ("a.csv", b"\xef\xbb\xbftext\r\none\r\n", "one"),
        ("a.tsv", b"\xef\xbb\xbftext\r\none\r\n", "one"),
        ("a.json", b'\xef\xbb\xbf [{"text": "one"}]', "one"),
    ],
)
def test_marks_and_line_ends(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert [record.fields["text"] for record in read(tmp_path / name)] == [text]


def test_a_json_file_of_lines_and_lines_in_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(written(".json"))
    (tmp_path / "b.json").write_bytes(written(".jsonl"))
    for name in ("a.jsonl", "b.json"):
        assert [dict(record.fields) for record in read(tmp_path / name)] == ROWS


@pytest.mark.parametrize("size", [1, 5, 17, 1000])
def test_blank_lines_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Those at the end are none; one before a record is a bad record, once, whichever pieces they are in."""
    monkeypatch.setattr(files, "PIECE_BYTES", size)
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n\n \n\n{"n": 2}\n\n\n\n')
    found = [item for piece in pieces_of(path, "key", cut=True) for item in records_of(numbered(piece), "key", "text")]
    assert [item.fields["n"] for item in found if isinstance(item, Record)] == [1, 2]
    blank = [str(item).partition("line ")[2] for item in found if isinstance(item, BadRecord)]
    assert blank
    assert set(blank) <= {f"{number} is blank: remove it" for number in (2, 3, 4)}
    path.write_text('{"n": 1}\n\n \n\n')
    assert [record.fields["n"] for record in read(path)] == [1]


@pytest.mark.parametrize(
    ("name", "start"), [("a.jsonl", b'{"text": "'), ("a.csv", b"text\n"), ("a.json", b'[{"text": "')]
)
def test_lines_that_do_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: bytes) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 12)
    monkeypatch.setattr(files, "CHUNK", 1 << 10)
    (tmp_path / name).write_bytes(start + b"a" * (1 << 16))
    with pytest.raises(UserError, match=r"a\.\w+, (line|item) \d is longer than 0 MiB"):
        read(tmp_path / name)
    monkeypatch.setattr(files, "LONGEST_DOCUMENT", 1 << 12)
    (tmp_path / "a.txt").write_bytes(b"a" * (1 << 13))
    with pytest.raises(UserError, match=r"a.txt is one document of over 0 GiB: split it"):
        read(tmp_path / "a.txt")
