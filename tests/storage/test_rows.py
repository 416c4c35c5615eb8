"""A line of metrics.jsonl that is not what was written is named, and nothing else is lost with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opt_parallel.storage.checked import dump_checked
from opt_parallel.storage.rows import keep_rows, read_rows, rows_of

ROWS = [
    {"kind": "train", "step": 1, "loss": 5.25, "lr": 6e-4, "epochs": {"größe": 0.5}},
    {"kind": "validation", "step": 1, "loss": 4.75, "perplexity": 115.6},
    {"kind": "train", "step": 2, "loss": None, "lr": 6e-4, "epochs": {"größe": 1.5}},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(dump_checked(row) + "\n" for row in ROWS))
    return tmp_path / "metrics.jsonl"


def test_every_flipped_bit_is_seen_or_without_effect(path: Path) -> None:
    content, seen = bytearray(path.read_bytes()), 0
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        rows, damaged = read_rows(path)
        rows = [{key: row[key] for key in row if len(key) != len("checksum")} for row in rows]  # by another name
        assert all(row in ROWS for row in rows)
        assert damaged or rows == ROWS, bytes(content)
        seen += bool(damaged)
        content[bit // 8] ^= 1 << bit % 8
    assert seen > 0.9 * 8 * len(content)


DAMAGES = {
    "not JSON": b'{"kind": "train", "st',
    "nothing": b"",
    "a list": b"[1]",
    "not UTF-8": b'{"kind": "\xff", "step": 2, "loss": 1.0}',
    "no loss": b'{"kind": "train", "step": 2}',
    "a loss in words": b'{"kind": "train", "step": 2, "loss": "x"}',
    "an infinite loss": b'{"kind": "train", "step": 2, "loss": Infinity}',
    "an enormous loss": b'{"kind": "train", "step": 2, "loss": 1e999}',
    "a step in words": b'{"kind": "train", "step": "2", "loss": 1.0}',
    "half a step": b'{"kind": "train", "step": 2.5, "loss": 1.0}',
    "no step": b'{"kind": "train", "step": true, "loss": 1.0}',
    "an enormous step": b'{"kind": "train", "step": ' + b"1" * 5000 + b', "loss": 1.0}',
    "a key twice": b'{"kind": "train", "step": 2, "step": 3, "loss": 1.0}',
    "deep": b"[" * 100_000,
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_left_out_and_said(path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(content := first + DAMAGES[damage] + b"\n" + b"".join(others))
    assert read_rows(path) == (ROWS, [2])
    assert rows_of(path) == ROWS
    keep_rows(path, 1)
    assert read_rows(path) == (ROWS[:2], [])
    aside = path.with_name("metrics.jsonl.damaged")
    assert aside.read_bytes() == content
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all(f"{path}, line 2" in line for line in said)
    assert aside.name in said[1]


def test_a_line_cut_short_by_a_kill_is_nothing_special(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is one that lacks its end alone."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-1])
    assert read_rows(path) == (ROWS, [])
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert read_rows(path) == (ROWS[:2], [])
    keep_rows(path, 1)
    assert path.read_bytes() == b"".join(lines[:2])
    assert capsys.readouterr().out == ""


def test_rows_of_earlier_versions_have_no_checksum(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_rows(path) == (ROWS, [])
