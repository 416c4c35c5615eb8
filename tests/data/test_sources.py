"""Sources: what an entry leads to, the documents in it, and every mistake named in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from opt_parallel.data.sources import Corpus
from opt_parallel.errors import UserError

GOOD = '{"text": "a document of some words"}\n'


def find(*entries: str | Path) -> Corpus:
    return Corpus.find("data.train", [str(entry) for entry in entries], "text")


def read(*entries: str | Path) -> list[str]:
    return list(find(*entries).documents())


def fails(message: str, *entries: str | Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(*entries)
    assert "\n" not in str(raised.value)


def test_folder_glob_and_list(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / "a.md").write_text("\ufefffirst of all, a page\nof two lines \n\n")
    (tmp_path / "below" / "b.txt").write_text("second")
    (tmp_path / "image.png").write_bytes(b"\xff\xd8")
    (tmp_path / "settings.json").write_text("no text, and not searched for")
    (tmp_path / "c.jsonl").write_text('{"text": "third\\n"}\n{"text": "fourth and last"}\n')
    expected = ["first of all, a page\nof two lines", "second", "third", "fourth and last"]
    assert read(tmp_path) == expected
    assert read(f"{tmp_path}/**/*.[mt]*", tmp_path / "c.jsonl") == expected
    assert read(tmp_path / "c.jsonl", f"{tmp_path}/*/b.txt", tmp_path) == expected


def test_a_file_with_two_names_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("once")
    monkeypatch.chdir(tmp_path)
    assert find("a.txt", tmp_path, "*.txt") == find(tmp_path / "a.txt")


def test_a_json_file_that_is_named_is_read_by_lines(tmp_path: Path) -> None:
    (tmp_path / "few.json").write_text(GOOD * 2)
    assert read(tmp_path / "few.json") == ["a document of some words"] * 2


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": ["one \n", "two"], "validation": ["three"]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [{"body": text} for text in splits[split]])
    train, validation = (Corpus.find(f"data.{split}", ["foo/bar"], "body") for split in splits)
    assert list(train.documents()) == ["one", "two"]
    assert list(validation.documents()) == ["three"]
    assert train.identity() != validation.identity()


def test_identity_changes_with_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    identity = find(path).identity()
    assert find(tmp_path).identity() == identity
    assert Corpus.find("data.train", [str(path)], "body").identity() != identity
    os.utime(path, ns=(1, 1))  # same size, another time
    assert find(path).identity() != identity
    json.dumps(identity)  # it becomes part of a fingerprint


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("no json\n", r"train.jsonl, line 2 is not JSON \(Expecting value at column 1\): each line must be an object"),
        ("[1]\n", "train.jsonl, line 2 is a list: each line must be an object"),
        ('{"body": 1}\n', r"train.jsonl, line 2 has no field 'text', only \['body'\]: set data.text_field"),
        ('{"text": null}\n', "train.jsonl, line 2: 'text' is None, not a string"),
        ('{"text": "\\ud800"}\n', "train.jsonl, line 2: .* is half a character"),
        ("\n" + GOOD, "train.jsonl, line 2 is blank"),
        ('{"text": "\udcff"}\n', r"train.jsonl, line 2 is not UTF-8 at byte 10 \(0xff\)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes((GOOD + bad).encode("utf-8", "surrogateescape"))
    fails(message, path)


def test_blank_lines_at_the_end_are_fine(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD + "\n  \n")
    assert read(tmp_path / "train.jsonl") == ["a document of some words"]


def test_files_without_text(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails("empty holds no text: a folder is searched for .md, .py, .rst, .txt, .jsonl", tmp_path / "empty")
    (tmp_path / "blank.txt").write_text(" \n\n")
    fails("blank.txt holds no text: name a file that does", tmp_path / "blank.txt")
    (tmp_path / "bytes.txt").write_bytes(b"abc \xff")
    fails(r"bytes.txt is not UTF-8 at byte 4 \(0xff\)", tmp_path / "bytes.txt")


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach\n{name}")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    fails("data.train is not set")
    fails("none.txt: no such file or folder", tmp_path / "none.txt")
    fails("data.train=none.jsonl: no such file or folder", "none.jsonl")
    fails("matches no file", f"{tmp_path}/*.txt")
    fails("data.train=foo/bar: no such file, folder or glob, and the hub .*reach", "foo/bar")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "secret.txt")  # root may read everything
    for name in ("open.txt", "secret.txt"):
        (tmp_path / name).write_text("text")
    fails("secret.txt cannot be read: change its permissions or leave it out", tmp_path)
