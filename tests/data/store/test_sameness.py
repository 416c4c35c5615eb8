"""The same text is found again wherever it lies and whenever it was written; another one never is taken for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.data.prepare import PreparedSource, prepare
from opt_parallel.data.store import sameness
from opt_parallel.data.store.cache import fingerprint
from opt_parallel.data.text.sources import Corpus

LINES = [f"document {number} has some words and no more" for number in range(60)]


def write(path: Path, texts: list[str] = LINES) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run_on(folder: Path, train: Path, stream: bool = False, **data: str) -> Run:
    settings = {"sequence_length": 8, "cache": str(folder / "cache"), "stream": stream, **data}
    return Run(
        model=ModelConfig(vocab_size=300, max_position_embeddings=128), data=DataConfig(train=str(train), **settings)
    )


def source_of(folder: Path, train: Path, stream: bool = False) -> PreparedSource:
    (source,) = prepare(run_on(folder, train, stream)).train
    return source


def content(folder: Path, train: Path, stream: bool = False) -> tuple[str, ...]:
    return sameness.content_of(run_on(folder, train).data.cache, Corpus.find("data.train", [str(train)]), stream)


def in_the_middle(path: Path) -> None:
    """Of the same size, beginning, end and time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_was_moved_copied_or_touched(tmp_path: Path, stream: bool) -> None:
    for name in ("b", "a"):
        write(tmp_path / "here" / f"{name}.jsonl", [f"{name}: {text}" for text in LINES])
    first = source_of(tmp_path, tmp_path / "here", stream)
    for path in (tmp_path / "here").iterdir():
        os.utime(path, ns=(1, 1))
    assert source_of(tmp_path, tmp_path / "here", stream).store == first.store
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    assert source_of(tmp_path, tmp_path / "copy", stream).store == first.store
    (tmp_path / "copy" / "a.jsonl").rename(tmp_path / "copy" / "aa.jsonl")  # the order of the files stays
    assert source_of(tmp_path, tmp_path / "copy", stream).store == first.store
    (tmp_path / "copy" / "aa.jsonl").rename(tmp_path / "copy" / "c.jsonl")
    assert source_of(tmp_path, tmp_path / "copy", stream).store != first.store
    kind = "stream" if stream else "store"
    assert len([path for path in (tmp_path / "cache").glob(f"{kind}-*") if path.is_dir()]) in (0, 2)


def test_another_text_of_the_same_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is not looked into at its ends alone, another time makes it be read."""
    path = write(tmp_path / "text.jsonl")
    before = content(tmp_path, path)
    in_the_middle(path)
    assert content(tmp_path, path) != before
    monkeypatch.setattr(sameness, "ENDS", 16)
    before = content(tmp_path, path)
    in_the_middle(path)
    os.utime(path)
    assert content(tmp_path, path) != before


def test_the_same_bytes_by_another_ending(tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl")
    before = content(tmp_path, path)
    assert content(tmp_path, path.rename(tmp_path / "text.txt")) != before


def test_a_data_set_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.jsonl")

    def cache_key() -> list[object]:
        (folder,) = tmp_path.glob("*set")
        corpus = Corpus.find("data.train", [str(folder)], split="train")
        found = sameness.content_of(run_on(tmp_path, folder).data.cache, corpus, stream=False)
        return [found, corpus.cache_key()]

    before = cache_key()
    (tmp_path / "set").rename(tmp_path / "other-set")
    assert cache_key() == before
    in_the_middle(tmp_path / "other-set" / "train.jsonl")
    assert cache_key() != before


def test_blocks_make_one_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sameness, "ENDS", 16)
    monkeypatch.setattr(sameness, "BLOCK", 100)
    monkeypatch.setattr(sameness, "CHUNK", 30)
    monkeypatch.setattr(sameness, "AT_ONCE", 3)
    write(tmp_path / "text" / "a.jsonl", LINES[:7])
    write(tmp_path / "text" / "b.jsonl", LINES)
    (tmp_path / "text" / "c.jsonl").touch()
    seen = {content(tmp_path, tmp_path / "text")}
    data = bytearray((tmp_path / "text" / "b.jsonl").read_bytes())
    for place in range(20, len(data) - 20, 50):
        data[place] ^= 1
        (tmp_path / "text" / "b.jsonl").write_bytes(data)
        seen.add(content(tmp_path, tmp_path / "text"))
    assert len(seen) == 1 + len(range(20, len(data) - 20, 50))


def test_text_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was remembered and is damaged is found out anew."""
    path, read = write(tmp_path / "text.jsonl"), list[int]()
    plain: Callable[..., list[str]] = sameness._read

    def counted(*arguments: object) -> list[str]:
        read.append(1)
        return plain(*arguments)

    monkeypatch.setattr(sameness, "_read", counted)
    before = content(tmp_path, path)
    assert (content(tmp_path, path), len(read)) == (before, 1)
    (remembered,) = (tmp_path / "cache").glob("checksums-*.json")
    for damaged in (
        b"",
        b"\x00\xff",
        b'{"checksums": 3}',
        b'{"checksums": []}',
        b'{"checksums": ["a"], "checksum": "0"}',
    ):
        remembered.write_bytes(damaged)
        assert content(tmp_path, path) == before
    assert len(read) == 6
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder can be here")
    assert content(tmp_path, path) == before


def test_what_earlier_versions_made_is_found(tmp_path: Path) -> None:
    """By path and time; a run that was trained on it knows its text again, here and elsewhere."""
    path = write(tmp_path / "text.jsonl")
    made = prepare(run_on(tmp_path, path))
    (source,) = made.train
    assert source.store.name == source.known_as[0] != source.known_as[1]
    corpus = Corpus.find("data.train", [str(path)])
    former = tmp_path / "cache" / f"tokenizer-{fingerprint([[[corpus.identity(), None]], ['1'], 300])}"
    made.tokenizer.rename(former)
    source.store.rename(tmp_path / "cache" / source.known_as[1])
    again = prepare(run_on(tmp_path, path))
    assert (again.tokenizer, again.train[0].store.name) == (former, source.known_as[1])
    assert again.text == made.text  # what checkpoints call it from now on
    os.utime(path)
    assert prepare(run_on(tmp_path, path)).train[0].store == source.store  # nobody knows that it is that one
