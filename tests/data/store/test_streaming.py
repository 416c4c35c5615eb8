"""A stream gives the samples that its text gives when it is there from the start, however it arrives."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import SMALL, python
from encoders import Slow
from stores import ids_of
from training import trained

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.data import tasks
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.data.samples.order import Streamed
from opt_parallel.data.store import stream as streaming
from opt_parallel.data.store import workers
from opt_parallel.data.store.build import Recipe, fill
from opt_parallel.data.store.statistics import finish_store
from opt_parallel.data.store.store import TokenStore
from opt_parallel.data.store.stream import Filling, GrowingStore, complete_parts
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError

TOKENIZER = train_tokenizer(["some words to learn from, and some more words"] * 3, 280)
TEXTS = [f"document {number} has some words and no more" for number in range(300)]
LENGTH, BLOCK = 8, 32
EVERYTHING = 1 << 40  # tokens


@pytest.fixture(autouse=True)
def fillers() -> Iterator[None]:
    yield
    for filler in multiprocessing.active_children():
        filler.kill()
        filler.join()


def corpus_of(folder: Path, texts: list[str]) -> Corpus:
    """Records so large that a batch holds a hundred of them, and the text itself is soon encoded."""
    folder.mkdir(exist_ok=True)
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "more": "x" * 10000}) + "\n" for text in texts))
    return Corpus.find("data.train", [str(path)])


def tokens_of(corpus: Corpus, folder: Path) -> list[int]:
    """What a store of the same text holds that was filled before."""
    recipe = Recipe(corpus, TextEncoder(TOKENIZER, 2))
    folder.mkdir()
    finish_store(folder, recipe.encoder.columns, fill(folder, [recipe], 1), None)
    store = TokenStore(folder)
    return store.of_tokens("ids", 0, store.tokens).tolist()


def growing(filling: Filling) -> GrowingStore:
    return GrowingStore(filling.folder, filling.recipe.encoder.columns, LENGTH)


@pytest.mark.parametrize("size", [1, 31, 32, 100])
def test_the_order_is_of_the_position_alone(size: int) -> None:
    """Whether the end has been seen yet or not: three epochs of permutations, shuffled within blocks."""

    def arriving(rows: int) -> int | None:  # only so much is there as was waited for
        return None if rows <= size else size

    late, early = Streamed(7, BLOCK, arriving), Streamed(7, BLOCK, lambda rows: size)
    numbers = [late.sample_at(position) for position in range(3 * size)]
    assert numbers == [early.sample_at(position) for position in range(3 * size)]
    epochs = [numbers[start : start + size] for start in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    for start in range(0, size, BLOCK):
        block = list(range(start, min(start + BLOCK, size)))
        orders = [epoch[start : start + BLOCK] for epoch in epochs]
        assert all(sorted(order) == block for order in orders)
        assert len(block) < 4 or len({*map(tuple, orders), tuple(block)}) == 4
    assert early.epoch_at(size) == 1.0


def test_read_while_it_is_filled(tmp_path: Path) -> None:
    """By a process that is killed on the way and started again: the parts that were whole are not made again."""
    corpus = corpus_of(tmp_path / "text", TEXTS)
    expected = tokens_of(corpus, tmp_path / "plain")
    filling = Filling(tmp_path / "stream", Recipe(corpus, Slow(TOKENIZER, 2)), EVERYTHING, 1, part_tokens=1)
    filler = filling.start()
    assert filler is not None
    store = growing(filling)
    assert store.arrived(3) is None
    assert store.of_tokens("ids", 0, 25).tolist() == expected[:25]
    assert not store.ended
    filler.kill()
    filler.join()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stream").glob("part-?????")}
    assert kept
    filling.start()
    assert store.arrived(EVERYTHING) == (len(expected) - 1) // LENGTH
    assert store.of_tokens("ids", 0, store.tokens).tolist() == expected
    assert {name: (tmp_path / "stream" / name).stat().st_mtime_ns for name in kept} == kept
    whole = TokenStore(tmp_path / "stream")
    assert whole.of_tokens("ids", 0, whole.tokens).tolist() == expected
    assert whole.manifest["statistics"]["documents"] == len(TEXTS)


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "text", TEXTS)
    expected = tokens_of(corpus, tmp_path / "plain")
    for enough in (10, len(expected) // 2):
        filling = Filling(tmp_path / "stream", Recipe(corpus, TextEncoder(TOKENIZER, 2)), enough, 1)
        filling.complete()
        store = growing(filling)
        store.arrived(1)
        assert enough <= store.tokens < len(expected) * 0.9
        assert store.of_tokens("ids", 0, store.tokens).tolist() == expected[: store.tokens]
        assert not store.ended


def test_a_stream_that_breaks_off_is_told_to_all_who_wait(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "text", TEXTS)
    expected = tokens_of(corpus, tmp_path / "plain")
    path = corpus.files[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    filling = Filling(tmp_path / "stream", Recipe(corpus, Slow(TOKENIZER, 2)), EVERYTHING, 1, part_tokens=1)
    filling.start()
    told: list[str] = []

    def wait() -> None:
        with pytest.raises(UserError) as raised:
            growing(filling).arrived(EVERYTHING)
        told.append(str(raised.value))

    waiting = [threading.Thread(target=wait) for _ in range(2)]
    for each in waiting:
        each.start()
    for each in waiting:
        each.join(timeout=60)
    assert len(told) == 2
    assert all(f"{path}, line 226 is not JSON" in line for line in told)
    before = len(complete_parts(filling.folder))
    with pytest.raises(UserError, match="line 226 is not JSON"):
        filling.complete()
    assert len(complete_parts(filling.folder)) == before  # nothing is added where nothing came
    path.write_bytes(whole)  # a line of the hub: the same place, and the rest is there now
    store = growing(filling)  # opened before the filler begins, when the failure is still told
    kept = [part.stat().st_mtime_ns for part in sorted((tmp_path / "stream").glob("part-?????"))]
    filling.start()
    assert store.arrived(EVERYTHING) == (len(expected) - 1) // LENGTH
    assert store.of_tokens("ids", 0, store.tokens).tolist() == expected
    assert [part.stat().st_mtime_ns for part in sorted((tmp_path / "stream").glob("part-?????"))][: len(kept)] == kept


def test_a_filler_that_is_stopped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK", 0.2)
    filling = Filling(
        tmp_path / "stream", Recipe(corpus_of(tmp_path / "text", TEXTS), Slow(TOKENIZER, 2)), EVERYTHING, 1,
        part_tokens=1,
    )  # fmt: skip
    filler = filling.start()
    assert filler is not None
    assert filler.pid is not None
    store = growing(filling)
    store.arrived(3)
    os.kill(filler.pid, signal.SIGSTOP)
    with pytest.raises(
        UserError, match=rf"process {filler.pid} on .*, which fills .*stream, is stopped for .*start again"
    ):
        store.arrived(EVERYTHING)
    filling.start()
    assert growing(filling).arrived(EVERYTHING) is not None


def test_a_filler_that_is_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOST", 0.5)
    corpus = corpus_of(tmp_path / "text", TEXTS[:3])
    store = growing(Filling(tmp_path / "stream", Recipe(corpus, Slow(TOKENIZER, 2)), EVERYTHING, 1, part_tokens=1))
    with pytest.raises(UserError, match=r"no process fills .*stream any more: repeat the command"):
        store.arrived(1)


def test_too_little_for_one_row(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("few")
    recipe = Recipe(Corpus.find("data.train", [str(path)]), TextEncoder(TOKENIZER, 2))
    filling = Filling(tmp_path / "stream", recipe, EVERYTHING, 1)
    filling.complete()
    with pytest.raises(UserError, match=r"data.train: 4 tokens do not fill one row: data.sequence_length=8 needs 9"):
        growing(filling).arrived(1)


def configure(folder: Path, train: Any, **data: Any) -> Run:
    settings = {"sequence_length": LENGTH, "cache": str(folder / "cache"), **data}
    return Run(
        model=ModelConfig(vocab_size=280, max_position_embeddings=128),
        data=DataConfig(train=train, **settings),
        batch={"global": 8, "micro": 8},
        steps=50,
    )


def test_a_mixture_with_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The first 400 samples, over an epoch of the stream, are the same while it arrives, later, and in every
    layout."""
    monkeypatch.setattr(tasks, "BLOCK", BLOCK)
    for name, text in (("a", "first"), ("b", "second")):
        rows = [{"text": f"{text} {number} and some words"} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 1}, {"path": str(tmp_path / "b.jsonl"), "stream": True}]
    run = configure(tmp_path, sources)
    prepared: Prepared = prepare(run)
    fresh = tasks.open_mixture(run, prepared, Clock())
    samples = [fresh.sample(position).ids.tolist() for position in range(400)]
    again = tasks.open_mixture(run, prepared, Clock())
    assert [again.sample(position).ids.tolist() for position in (399, 0, 200)] == [
        samples[place] for place in (399, 0, 200)
    ]
    everything = [(data, micro) for data in (1, 2, 4) for micro in (1, 2, 4)]
    for data, micro in everything if request.config.getoption("long") else [(2, 1), (1, 4)]:
        assert ids_of(tasks.open_mixture(run, prepared, Clock()), data, micro, 0, 400) == dict(enumerate(samples))
    stream = TokenStore(prepared.train[1].store)
    plain = prepare(configure(tmp_path, sources[1]["path"], tokenizer=str(prepared.tokenizer)))
    known = TokenStore(plain.train[0].store)
    assert stream.of_tokens("ids", 0, stream.tokens).tolist() == known.of_tokens("ids", 0, known.tokens).tolist()
    assert fresh.epochs(400)["b"] > 1


@pytest.mark.parametrize("batch", [2, pytest.param(8, marks=pytest.mark.long), 32])
def test_what_is_filled_follows_from_the_clock(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with a smaller batch has more samples behind it than steps times the batch, and waits for no
    block that nobody makes."""
    monkeypatch.setattr(tasks, "BLOCK", BLOCK)
    monkeypatch.setattr(streaming, "LOST", 5.0)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(9) for text in TEXTS))
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    run = configure(tmp_path, str(path), stream=True, tokenizer=str(tmp_path / "tokenizer"))
    run = dataclasses.replace(run, batch={"global": batch, "micro": 1}, steps=50)
    clock = Clock(step=40, samples=40 * 32)
    mixture = tasks.open_mixture(run, prepare(run), clock)
    for position in range(clock.samples, clock.samples + 10 * batch):
        mixture.sample(position)


def test_train_py_on_a_stream_that_ends_early(crew: Any, tmp_path: Path) -> None:
    """One line and status 2; nothing is amiss with one that has what it says."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"Sentence {number} of the text tells of {number * number}."} for number in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = (
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
        "    num_examples: 50\n    num_bytes: 100\n---\n"
    )
    (folder / "README.md").write_text(card)
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    arguments = [
        *SMALL, f"data.train=[{{path: {folder}, split: train, stream: true}}]", f"run.dir={tmp_path / 'run'}",
        f"data.tokenizer={tmp_path / 'tokenizer'}", f"data.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    broken = trained(crew(1), *arguments)
    assert broken.returncode == 2, broken.stdout + broken.stderr
    errors = [line for line in broken.stderr.splitlines() if line]
    assert len(errors) == 1, broken.stderr
    assert "ended after 40 rows, but its split 'train' has 50: repeat the command" in errors[0]
    (folder / "README.md").write_text(card.replace("50", "40"))
    whole = python("scripts/prepare.py", *arguments)
    assert whole.returncode == 0, whole.stderr
    assert "data.train: 40 documents, " in whole.stdout
