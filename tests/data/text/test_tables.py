"""Tables in text: rows stay rows, whatever marks and bytes are in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opt_parallel.data.text import files, tables
from opt_parallel.data.text.files import pieces_of, records_of
from opt_parallel.data.text.records import BadRecord, Record
from opt_parallel.runtime.errors import UserError


def items(folder: Path, name: str, content: str | bytes) -> list[dict[str, Any] | str]:
    """The rows of a file, and instead of a bad one what is said of it."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = [item for piece in pieces_of(path, "key", cut=True) for item in records_of(piece, "key", "text")]
    return [
        dict(item.fields) if isinstance(item, Record) else str(item).removeprefix(f"key: {path}, ") for item in found
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ('"I came\t1\nsaw"\t0\n', [('"I came', "1"), ('saw"', "0")]),  # one row of csv, with the wrong label
        ('5" tall\t1\nsays "no"\t0\n', [('5" tall', "1"), ('says "no"', "0")]),
        ('"a" and "b"\t1\n', [('"a" and "b"', "1")]),
        ('"\t1\n""\t0\n', [('"', "1"), ("", "0")]),
        ('"quoted"\t1\n"a ""b"" c"\t0\n', [("quoted", "1"), ('a "b" c', "0")]),
        ('"two\nlines"\t1\n"a\ttab"\t0\n', [("two\nlines", "1"), ("a\ttab", "0")]),
        ("a\t1\r\nb\t0\r\n\r\n", [("a", "1"), ("b", "0")]),
    ],
)
def test_quotation_marks_in_tsv(tmp_path: Path, rows: str, expected: list[tuple[str, str]]) -> None:
    found = items(tmp_path, "a.tsv", f"text\tlabel\n{rows}")
    assert found == [{"text": text, "label": label} for text, label in expected]


def test_csv_with_everything(tmp_path: Path) -> None:
    content = '\ufeff"text",n\r\n"a ""b""\r\nand c",1\r\n\r\nplain,2\r\n'
    assert items(tmp_path, "a.csv", content) == [{"text": 'a "b"\r\nand c', "n": "1"}, {"text": "plain", "n": "2"}]


def test_a_bad_row_hides_no_other(tmp_path: Path) -> None:
    found = items(tmp_path, "a.csv", b'text,n\na,1\nb\n"c"x,3\n"d\xff\nmore",4\ne\0,5\nf,6\n')
    assert [row for row in found if isinstance(row, dict)] == [{"text": "a", "n": "1"}, {"text": "f", "n": "6"}]
    bad = [row for row in found if isinstance(row, str)]
    assert [line.partition(" ")[2].partition(" (")[0] for line in bad] == [
        "3 has 1 columns, but the first line has 2: correct it",
        "4 is malformed",
        "5 is not UTF-8 at byte 2",
        "7 contains a NUL byte, so it is not UTF-8 text: convert it or leave it out",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,n\na,1\n"b\nc,2\n', "line 3 is malformed (unexpected end of data)"),
        ('text,n\n"a\nb"c,1\nd,2\n', "line 2 is malformed"),
        ("text,text\na,1\n", "line 1: the column name 'text' occurs twice"),
        ("text,\udcff\na,1\n", "line 1 is not UTF-8"),
    ],
)
def test_what_may_take_other_rows_with_it_is_the_files_fault(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    content = content if name == "a.csv" else content.replace(",", "\t").replace('"b\n', '"b\n\n')
    if name == "a.tsv" and '"a\n' in content:
        content = content.replace('"a\n', '"a\n\n')
    with pytest.raises(UserError) as raised:
        items(tmp_path, name, content.encode("utf-8", "surrogateescape"))
    assert message in str(raised.value)
    assert not isinstance(raised.value, BadRecord)


def test_a_mark_that_nothing_closes_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST_FIELD", 1000)
    with pytest.raises(UserError, match=r"line 2 is malformed \(field larger than field limit"):
        items(tmp_path, "a.csv", 'text,n\n"a,1\n' + "b,2\n" * 1000)
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    with pytest.raises(UserError, match="line 2 is longer than 0 MiB"):
        items(tmp_path, "a.csv", "text,n\n" + "a" * 1001 + ",1\n")
