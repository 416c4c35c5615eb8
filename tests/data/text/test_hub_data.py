"""Datasets that the library reads: which split, which shard is bad and why, and what only trying again can help."""

from __future__ import annotations

import bz2
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import httpx
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from opt_parallel.data.text.hub_data import _is_network
from opt_parallel.data.text.records import Record, sift
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.errors import UserError

EMPTY = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
CARD = (
    "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n# A set\n"
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def lines(count: int, word: str = "row") -> str:
    return "".join(json.dumps({"text": f"{word} {number}"}) + "\n" for number in range(count))


def rows(folder: Path, stream: bool, key: str = "data.train", **settings: Any) -> list[dict[str, Any]]:
    corpus = Corpus.find(key, [str(folder)], **settings)
    items = (item for _, item in corpus.streamed()) if stream else corpus.items()
    return [dict(record.fields) for record in sift(items, lambda record: None, None)]


def texts(folder: Path, stream: bool, **settings: Any) -> list[str]:
    return [row["text"] for row in rows(folder, stream, **settings)]


def both(folder: Path, **settings: Any) -> list[str]:
    """The text of a dataset as it is prepared, and as it is streamed: the same."""
    whole = texts(folder, stream=False, **settings)
    assert texts(folder, stream=True, **settings) == whole
    return whole


def test_empty_shards_are_empty(tmp_path: Path) -> None:
    parquet.write_table(EMPTY, tmp_path / "train-0.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"] * 3}), tmp_path / "train-1.parquet")
    parquet.write_table(EMPTY, tmp_path / "train-2.parquet")
    assert both(tmp_path, split="train") == ["a"] * 3
    (tmp_path / "train-1.parquet").unlink()
    assert both(tmp_path, split="train") == []


def damage(folder: Path, kind: str) -> None:
    """Two shards, the second of them bad."""
    (folder / "train-0.jsonl").write_text(lines(5))
    bad = folder / "train-1.jsonl"
    if kind == "columns":
        bad.write_text('{"text": "the sun", "meta": {"n": 1}}\n')
    if kind == "type":
        bad.write_text('{"text": [1, 2]}\n')
    if kind == "line":
        bad.write_text(lines(3) + "oops\n")
    if kind == "pointer":
        bad.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n")
    if kind == "zst":  # the library would take the frames that are whole for all there are
        packed = zstandard.compress(lines(50).encode())
        bad.with_name("train-1.jsonl.zst").write_bytes(packed + packed[:-9])
    if kind == "bz2":  # and this for rubbish
        packed = bz2.compress(lines(50).encode())
        bad.with_name("train-1.jsonl.bz2").write_bytes(packed + b"BZx" + packed[3:])
    if kind == "parquet":
        for number in (0, 1):
            (folder / f"train-{number}.jsonl").unlink(missing_ok=True)
            parquet.write_table(pyarrow.table({"text": ["a"] * 50}), folder / f"train-{number}.parquet")
        bad = folder / "train-1.parquet"
        bad.write_bytes(bad.read_bytes()[:-9])
    if kind == "csv":
        (folder / "train-0.jsonl").unlink()
        (folder / "train-0.csv").write_text("text,n\na,1\n")
        (folder / "train-1.csv").write_text("text,n\na,1\nb,2,3\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("columns", "column names don't match"), ("type", "Couldn't cast array"), ("line", "JSON parse error"),
        ("pointer", "pointer of Git LFS"), ("zst", "not a complete .zst file"), ("bz2", "not a complete .bz2 file"),
        ("parquet", "Parquet magic bytes not found"), ("csv", "Expected 2 fields in line 3, saw 3"),
    ],
)  # fmt: skip
def test_a_bad_shard_is_named_with_its_cause(
    tmp_path: Path, kind: str, cause: str, stream: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(tmp_path, kind)
    with pytest.raises(UserError) as raised:
        rows(tmp_path, stream, split="train")
    said = str(raised.value)
    assert f"{tmp_path}/train-1." in said
    assert cause in said
    assert "\n" not in said
    assert not any(words in said for words in ("hub", "repeat the command", "no such file"))
    assert capfd.readouterr().err == ""  # the library says nothing beside it


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines(2))
    for stream in (False, True):
        with pytest.raises(UserError, match=r"set has no split 'test', only train|has no split 'test', only train"):
            rows(tmp_path, stream, split="test")
    with pytest.raises(UserError, match="is a file, which has neither subset nor split"):
        rows(tmp_path / "train.jsonl", False, split="train")


def clone(folder: Path, pattern: str = "data/train-*") -> Path:
    """As `git clone` or the hub's command leave a data set."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD.format(pattern))
    (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    for split in ("train", "test"):
        parquet.write_table(pyarrow.table({"text": [f"{split} text"]}), folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def test_a_clone_of_a_data_set_is_read_as_the_hub_gives_it(tmp_path: Path) -> None:
    """Not its card, not its test split; also below a folder with other text."""
    folder = clone(tmp_path / "all/set")
    assert both(folder) == ["train text"]
    (tmp_path / "all/more.jsonl").write_text(lines(1))
    assert both(tmp_path / "all") == ["row 0", "train text"]
    with pytest.raises(UserError, match=r"set has no split 'validation', only train"):
        rows(folder, False, key="data.validation")
    assert [row["text"] for row in rows(folder / "data/test-00000-of-00001.parquet", False)] == ["test text"]


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "{}/secret.jsonl"])
def test_a_card_leads_nowhere_else(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "secret.jsonl").write_text(lines(1, "secret"))
    folder = clone(tmp_path / "set", pattern.format(tmp_path))
    for stream in (False, True):
        with pytest.raises(UserError, match=r"secret.jsonl, which is not in the folder|cannot be read"):
            rows(folder, stream)


@pytest.mark.parametrize(
    "start",
    [
        "# Notes\n",
        "---\ntitle: a page\n---\n",
        "---\n",
        "---\n- a\n---\n",
        "---\n: [\n---\n",
        "---\na: 2023-99-99\n---\n",
    ],
)
def test_a_readme_that_is_no_card_is_text(tmp_path: Path, start: str) -> None:
    (tmp_path / "README.md").write_text(start)
    (tmp_path / "a.jsonl").write_text(lines(1))
    assert len(texts(tmp_path, False)) == 2


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    names = ["no", "yes"]
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    one = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(6)], "label": [0, 1] * 3}, kinds)
    one.with_format("numpy").shuffle(seed=1).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "several")
    expected = [{"text": f"row {n}", "label": names[n % 2]} for n in range(6)]
    for stream in (False, True):
        assert sorted(rows(tmp_path / "one", stream), key=str) == sorted(expected, key=str)
        assert rows(tmp_path / "several", stream) == expected
        assert rows(tmp_path / "several", stream, split="test") == expected[:1]
    corpus = Corpus.find("data.train", [str(tmp_path / "several")])
    assert [record for _, record in corpus.streamed(0, 4)] == list(corpus.records())[4:]
    assert corpus.class_names("label") == names
    with pytest.raises(UserError, match="several has no split 'validation', only train, test"):
        rows(tmp_path / "several", False, key="data.validation")
    (shard,) = (tmp_path / "several/train").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:200])
    for stream in (False, True):
        with pytest.raises(UserError, match=r"several.* cannot be read.*: correct"):
            rows(tmp_path / "several", stream)


def test_a_hub_that_gives_nothing() -> None:
    with pytest.raises(UserError, match=r"foo/bar: not a local file, folder or glob, and its split"):
        list(Corpus.find("data.train", ["foo/bar"]).records())


class Broken(BaseHTTPRequestHandler):
    """Breaks off in the middle of what it announced."""

    def do_GET(self) -> None:
        content = lines(30000).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_networks_errors_are_told_apart(address: str) -> None:
    with pytest.raises(httpx.HTTPError) as raised:
        httpx.get(f"{address}/train.jsonl", trust_env=False)
    assert _is_network(raised.value)
    with pytest.raises(OSError) as refused:  # noqa: PT011
        socket.create_connection(("127.0.0.1", 1))
    outer = datasets.exceptions.DatasetGenerationError("An error occurred")
    outer.__cause__ = refused.value
    assert _is_network(outer)
    assert not _is_network(pyarrow.ArrowInvalid("JSON parse error"))
    assert not _is_network(FileNotFoundError(2, "No such file"))


def test_record_positions_of_a_stream(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines(4))
    corpus = Corpus.find("data.train", [str(tmp_path)], split="train")
    (number, record), *rest = corpus.streamed(0, 1)
    assert isinstance(record, Record)
    assert (number, record.where, len(rest)) == (0, f"data.train={tmp_path}, row 1", 2)
