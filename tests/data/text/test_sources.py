"""Sources: what an entry leads to, the documents in it, and every mistake named in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from opt_parallel.data.text import files, sources
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.errors import UserError

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


def test_a_dataset_in_a_folder_of_its_form(tmp_path: Path) -> None:
    """As one of the hub, by its split or subset."""
    for split, texts in (("train", ["one \n", "two"]), ("validation", ["three"])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    train, validation = (
        Corpus.find(f"data.{split}", [str(tmp_path)], "body", split=split) for split in ("train", "validation")
    )
    assert list(train.documents()) == ["one", "two"]
    assert list(validation.documents()) == ["three"]
    assert [record.where for record in validation.records()] == [f"data.validation={tmp_path}, row 0"]
    assert train.identity() != validation.identity()
    identity = train.identity()
    os.utime(tmp_path / "train.jsonl", ns=(1, 1))
    assert train.identity() != identity
    with pytest.raises(UserError, match="has no split 'test', only train, validation"):
        list(Corpus.find("data.train", [str(tmp_path)], split="test").records())


def test_a_stream_gives_the_same_records_and_goes_on_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a{n}"}) + "\n" for n in range(5)))
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"b{n}"}) + "\n" for n in range(7)))
    corpora = [find(tmp_path / "a.jsonl"), Corpus.find("data.train", [str(folder)], split="train")]
    for corpus, length in zip(corpora, (5, 7), strict=True):
        whole = list(corpus.records())
        assert len(whole) == length
        assert [record for _, record in corpus.streamed()] == whole
        assert [record for _, record in corpus.streamed(0, 3)] == whole[3:]
        assert [record for _, record in corpus.streamed(0, length)] == []


def test_a_stream_that_ends_early(tmp_path: Path) -> None:
    """The dataset's card says how many rows its split has."""
    (tmp_path / "train.jsonl").write_text(GOOD * 3)
    card = (
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
        "    num_examples: 4\n    num_bytes: 100\n---\n"
    )
    (tmp_path / "README.md").write_text(card)
    corpus = Corpus.find("data.train", [str(tmp_path)], split="train")
    with pytest.raises(UserError, match=r"ended after 3 rows, but its split 'train' has 4: repeat the command"):
        list(corpus.streamed())
    (tmp_path / "train.jsonl").write_text(GOOD * 3 + '{"text": ')
    with pytest.raises(UserError, match=r"train.jsonl, cannot be read after \d rows \(JSON parse error"):
        list(corpus.streamed())


def test_units_have_every_record_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines cut at any byte, small files together, rows of a dataset."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "é" * n}) + "\n" for n in range(40)))
    for name in ("b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text(name)
    table = pyarrow.table({"text": [f"row {n}" for n in range(30)]})
    parquet.write_table(table, tmp_path / "e.parquet", row_group_size=7)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": f"b{n}"}) + "\n" for n in range(9)))
    monkeypatch.setattr(sources, "ROWS_APART", 2)
    for corpus in (find(tmp_path), Corpus.find("data.train", [str(tmp_path / "set")], split="train")):
        whole = list(corpus.documents())
        assert len(whole) >= 9
        for size in (1, 17, 18, 1 << 20):
            for module in (files, sources):
                monkeypatch.setattr(module, "PIECE_BYTES", size)
            units = corpus.units()
            assert [corpus.text.of(record) for unit in units for record in corpus.read(unit)] == whole
            assert (len(units) > 1) == (size < 50)
    monkeypatch.setattr(files, "PIECE_BYTES", 17)
    lines = find(tmp_path / "a.jsonl")
    numbered = [record.where for unit in lines.units() for record in lines.read(unit, count_lines=True)]
    assert numbered == [f"data.train: {tmp_path / 'a.jsonl'}, line {number}" for number in range(1, 41)]


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
        ('{"text": "\\ud800"}\n', "train.jsonl, line 2: .* is half of a surrogate pair"),
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
    fails("empty contains no text: a folder is searched for .md, .py, .rst, .txt, .jsonl, .*.csv", tmp_path / "empty")
    (tmp_path / "blank.txt").write_text(" \n\n")
    fails("blank.txt contains no text: name a file with text", tmp_path / "blank.txt")
    (tmp_path / "bytes.txt").write_bytes(b"abc \xff")
    fails(r"bytes.txt is not UTF-8 at byte 4 \(0xff\)", tmp_path / "bytes.txt")


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    fails("data.train is not set")
    fails("none.txt: no such file or folder", tmp_path / "none.txt")
    fails("data.train=none.jsonl: no such file or folder", "none.jsonl")
    fails("matches no file", f"{tmp_path}/*.txt")
    fails("data.train=foo/bar: not a local file, folder or glob, and its split 'train' .*", "foo/bar")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode, **how: Path(path).name != "secret.txt")
    for name in ("open.txt", "secret.txt"):
        (tmp_path / name).write_text("text")
    fails("secret.txt cannot be read: change its permissions or leave it out", tmp_path)
