"""The stores: the documents as one stream cut into rows, found again while nothing changed, whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from filelock import FileLock

from opt_parallel.config import DataConfig, Run
from opt_parallel.data import prepare as module
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.data.tokens import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer
from opt_parallel.errors import UserError
from opt_parallel.shapes import ModelConfig

DOCUMENTS = ["the cat sat on the mat", "a second document, somewhat longer than the first one", "déjà vu 🙂"] * 3
LENGTH = 8


def lines(path: Path, documents: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents), encoding="utf-8")
    return path


def configure(folder: Path, vocab_size: int = 300, eos_token_id: int = 2, **data: Any) -> Run:
    settings = {"sequence_length": LENGTH, "cache": str(folder / "cache"), **data}
    return Run(
        model=ModelConfig(vocab_size=vocab_size, eos_token_id=eos_token_id, max_position_embeddings=128),
        data=DataConfig(**settings),
    )


def rows(store: Path | None) -> list[list[int]]:
    assert store is not None
    return list(load_from_disk(str(store))["ids"])


def stream(prepared: Prepared, documents: list[str]) -> list[int]:
    """What the rows must hold, the plain way."""
    encoded = encode_documents(load_tokenizer(str(prepared.tokenizer)), [document.rstrip() for document in documents])
    return [token for ids in encoded if ids for token in [*ids, 2]]


def cut(tokens: list[int]) -> list[list[int]]:
    count = (len(tokens) - 1) // LENGTH
    return [tokens[row * LENGTH : row * LENGTH + LENGTH + 1] for row in range(count)]


def test_rows_hold_the_stream_and_no_target_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [*DOCUMENTS, " \n", "the end \n\n"]
    train = lines(tmp_path / "train.jsonl", documents)
    validation = lines(tmp_path / "validation.jsonl", DOCUMENTS)
    prepared = prepare(configure(tmp_path, train=str(train), validation=str(validation)))
    tokens = stream(prepared, documents)
    assert rows(prepared.train) == cut(tokens)
    assert rows(prepared.validation) == cut(stream(prepared, DOCUMENTS))
    assert load_from_disk(str(prepared.train)).features["ids"].feature.dtype == "uint16"
    said = capsys.readouterr()
    over = (len(tokens) - 1) % LENGTH
    assert said.out.startswith(
        f"data.train: 10 documents (1 empty ones left out), {len(tokens)} tokens, {len(cut(tokens))} blocks of 8, "
        f"{over} tokens left over; in "
    )
    assert "data.validation: 9 documents, " in said.out
    assert said.err == ""  # no progress bars


def test_long_documents_and_small_batches_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "some words\n\n\n        and  more   spaces \n\t        here, it's déjà vu\n" * 30
    train = lines(tmp_path / "train.jsonl", [long, *DOCUMENTS, long])
    whole = prepare(configure(tmp_path, train=str(train)))
    monkeypatch.setattr(module, "PART_CHARACTERS", 7)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 20)
    parted = prepare(configure(tmp_path, train=str(train), cache=str(tmp_path / "other")))
    assert rows(parted.train) == rows(whole.train) == cut(stream(whole, [long, *DOCUMENTS, long]))


def test_wide_vocabularies_need_wider_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = lines(tmp_path / "train.jsonl", DOCUMENTS)
    narrow = prepare(configure(tmp_path, train=str(train)))
    monkeypatch.setattr(module, "count_tokens", lambda tokenizer: 65537)
    wide = prepare(configure(tmp_path, train=str(train), cache=str(tmp_path / "other")))
    assert load_from_disk(str(wide.train)).features["ids"].feature.dtype == "int32"
    assert rows(wide.train) == rows(narrow.train)


def test_a_tokenizer_that_was_brought(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", DOCUMENTS)
    brought = train_tokenizer(["quite other text, " * 9], 290)
    save_tokenizer(brought, tmp_path / "mine")
    prepared = prepare(configure(tmp_path, train=str(train), tokenizer=str(tmp_path / "mine")))
    assert load_tokenizer(str(prepared.tokenizer)).to_str() == brought.to_str()
    assert rows(prepared.train) == cut(stream(prepared, DOCUMENTS))


def test_text_in_both_splits_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared, other = lines(tmp_path / "shared.jsonl", DOCUMENTS), lines(tmp_path / "other.jsonl", DOCUMENTS)
    prepare(configure(tmp_path, train=[str(shared), str(other)], validation=str(shared)))
    assert "shared.jsonl is in both data.train and data.validation" in capsys.readouterr().out
    prepare(configure(tmp_path, train=str(other), validation=str(shared)))
    assert "is in both" not in capsys.readouterr().out


def test_splits_of_a_hub_dataset_have_stores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": DOCUMENTS, "validation": DOCUMENTS[:3]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [{"text": text} for text in splits[split]])
    prepared = prepare(configure(tmp_path, train="foo/bar", validation="foo/bar"))
    assert rows(prepared.train) == cut(stream(prepared, DOCUMENTS))
    assert rows(prepared.validation) == cut(stream(prepared, DOCUMENTS[:3]))


def test_done_once_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fills: list[Path] = []
    monkeypatch.setattr(module, "_flush", fills.append)
    train = lines(tmp_path / "train.jsonl", DOCUMENTS)
    run = configure(tmp_path, train=str(train))
    first = prepare(run)
    assert prepare(run) == first
    assert len(fills) == 2
    assert prepare(configure(tmp_path, train=str(train), sequence_length=4)).tokenizer == first.tokenizer
    assert len(fills) == 3
    lines(train, [*DOCUMENTS, "more"])
    again = prepare(run)
    assert again.train != first.train
    assert again.tokenizer != first.tokenizer
    assert len(fills) == 5
    os.utime(train, ns=(1, 1))  # same size, another time
    assert prepare(run).tokenizer not in (first.tokenizer, again.tokenizer)
    before = len(fills)
    assert prepare(configure(tmp_path, train=str(train), vocab_size=301)).tokenizer != again.tokenizer
    assert len(fills) > before


def fails(run: Run, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        prepare(run)
    assert "\n" not in str(raised.value)


def test_sources_with_too_little(tmp_path: Path) -> None:
    good, short = tmp_path / "good.txt", tmp_path / "short.txt"
    good.write_text("enough words to fill a block or two of eight tokens")
    short.write_text("!")
    needed = "2 tokens do not fill one block: data.sequence_length=8 needs 9"
    fails(configure(tmp_path), "data.train is not set")
    fails(configure(tmp_path, train=str(lines(tmp_path / "a.jsonl", ["", " "]))), "there is no text in .*a.jsonl")
    fails(configure(tmp_path, train=str(short)), f"data.train: {needed}")
    fails(configure(tmp_path, train=str(good), validation=str(short)), f"data.validation: {needed}")


def test_one_block_is_the_least(tmp_path: Path) -> None:
    source = tmp_path / "digits.txt"
    source.write_text("1234567")  # a vocabulary of bytes: seven tokens and the end
    fails(configure(tmp_path, 260, train=str(source)), "data.train: 8 tokens do not fill one block")
    source.write_text("12345678")
    assert len(rows(prepare(configure(tmp_path, 260, train=str(source))).train)) == 1


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    train = str(lines(tmp_path / "train.jsonl", DOCUMENTS))
    save_tokenizer(train_tokenizer(DOCUMENTS, 300), tmp_path / "mine")
    fails(configure(tmp_path, 280, train=train, tokenizer=str(tmp_path / "mine")), "mine has 300 tokens, .*=280 rows")
    fails(configure(tmp_path, 300, 3, train=train), r"null \(trained on data.train\) ends .* set model.eos_token_id=2")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", DOCUMENTS)
    fails(configure(tmp_path, train=str(train), cache=str(train)), "data.cache=.*train.jsonl cannot be written")


def test_a_failure_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    bad = tmp_path / "train.jsonl"
    bad.write_text('{"text": "a document of some words to fill a block"}\n' * 50 + "oops\n")
    fails(configure(tmp_path, train=str(bad)), "line 51 is not JSON")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


KILLED = """
import os, sys
from pathlib import Path
from opt_parallel.data import prepare as module
sys.path.insert(0, {folder!r})
from test_prepare import configure
flush = module._flush
module._flush = lambda folder: os.kill(os.getpid(), 9) if "blocks" in folder.name else flush(folder)
module.prepare(configure(Path(sys.argv[1]), train=sys.argv[2]))
"""


def test_a_killed_preparation_is_done_again(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", DOCUMENTS)
    script = KILLED.format(folder=str(Path(__file__).parent))
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(train)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (partial,) = (tmp_path / "cache").glob("blocks-*.partial")
    assert (partial / "state.json").exists()  # all of it was written; only the name was missing
    prepared = prepare(configure(tmp_path, train=str(train)))
    assert rows(prepared.train) == cut(stream(prepared, DOCUMENTS))
    assert not partial.exists()


def at_once(folder: Path, fill: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> list[Path | str]:
    """What two ranks get that want `folder` at once: the one that fills it does not begin before the other waits."""
    arrived = threading.Semaphore(0)

    class Announced(FileLock):
        def acquire(self, *positional: Any, **named: Any) -> Any:
            arrived.release()
            return super().acquire(*positional, **named)

    def patient(temporary: Path) -> None:
        assert arrived.acquire(timeout=20)
        assert arrived.acquire(timeout=20)
        fill(temporary)

    results: list[Path | str] = []

    def rank() -> None:
        try:
            results.append(module._whole(folder, patient))
        except UserError as error:
            results.append(str(error))

    monkeypatch.setattr(module, "FileLock", Announced)
    threads = [threading.Thread(target=rank) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_two_ranks_one_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fills: list[Path] = []
    folder = tmp_path / "cache" / "store"
    assert at_once(folder, fills.append, monkeypatch) == [folder, folder]
    assert len(fills) == 1


def test_a_rank_that_waited_is_told_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fills: list[Path] = []

    def fail(temporary: Path) -> None:
        fills.append(temporary)
        raise UserError("line 7 is wrong")

    folder = tmp_path / "cache" / "store"
    assert at_once(folder, fail, monkeypatch) == ["line 7 is wrong", "line 7 is wrong"]
    assert len(fills) == 1
    assert module._whole(folder, fills.append) == folder  # one that comes later tries anew
    assert len(fills) == 2
    assert not Path(f"{folder}.failed").exists()
