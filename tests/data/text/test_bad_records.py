"""One record that cannot be used hides no other: `error` says how many there are, `skip` leaves them out and tells."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from opt_parallel.config.data import BadRecordsPolicy
from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import EvaluationConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.data import tasks
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.encode.tokenizer import encode_documents, save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.data.store import build as filling
from opt_parallel.data.store.build import Recipe, fill
from opt_parallel.data.store.store import TokenStore
from opt_parallel.data.store.workers import _portable
from opt_parallel.data.text import files, sources
from opt_parallel.data.text.records import LEFT_OUT
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError

TOKENIZER = train_tokenizer(["some words to learn from, and some more words"] * 3, 280)
DEEP = '{"text": "deep", "more": ' + "[" * 5000 + "]" * 5000 + "}"


@pytest.fixture(autouse=True)
def fillers() -> Iterator[None]:
    yield
    for filler in multiprocessing.active_children():
        filler.kill()
        filler.join()


def configure(folder: Path, train: Any, skip: bool, task: TaskConfig | None = None, **data: Any) -> Run:
    save_tokenizer(TOKENIZER, folder / "tokenizer")
    own = {"tokenizer": str(folder / "tokenizer"), "cache": str(folder / "cache")}
    settings = {"sequence_length": 8, "workers": 1, "held_out": 0.0, **own, **data}
    return Run(
        model=ModelConfig(vocab_size=280, max_position_embeddings=128),
        data=DataConfig(
            train=train,
            bad_records=BadRecordsPolicy("skip" if skip else "error"),
            **settings,
        ),
        task=task or TaskConfig(),
        evaluation=EvaluationConfig(every=int(settings["held_out"] > 0)),
        batch={"global": 8, "micro": 8},
        steps=2,
    )


def store_of(prepared: Prepared) -> TokenStore:
    return TokenStore(prepared.train[0].store)


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def pair(completion: Any) -> dict[str, Any]:
    return {"prompt": "a question", "completion": completion}


def label(value: Any) -> dict[str, Any]:
    return {"text": "some words", "label": value}


GOOD = {"text": "some words"}
CASES: dict[str, tuple[TaskConfig, list[Any], list[int], str]] = {
    "text": (
        TaskConfig(),
        [
            GOOD, "oops", {"body": "x"}, GOOD, {"text": None}, "[1]", '{"text": "\\ud800"}', "", GOOD, DEEP,
            '{"n": 1' + "0" * 5000 + "}",
        ],
        [1, 4, 9],
        "line 2 is not JSON (Expecting value at column 1): each line must be an object, {…}; 8 of 11 records are bad",
    ),
    "pairs": (
        TaskConfig(name=Task.finetune),
        [
            pair("yes"), pair(""), pair(" \n"), pair("no"), {"prompt": "alone"}, {"messages": []},
            {"messages": [{"role": "user", "content": "hi"}]},
        ],
        [1, 4],
        "line 2: 'completion' is empty, so there is nothing to learn: fill it in, or leave the record out; 5 of 7",
    ),
    "labels": (
        TaskConfig(name=Task.classify, labels=["no", "yes"]),
        [label("yes"), label("maybe"), label("no"), label(""), {"text": "none"}, label({"a": 1}), label("yes")],
        [1, 3, 7],
        "line 4 has an empty field 'label'",
    ),
    "numbers": (
        TaskConfig(name=Task.classify),
        [label(0.5), label(1), label(10**400), label(-0.5)],
        [1, 2, 4],
        "line 3: the label 1000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_task(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    task, rows, good, message = CASES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*rows))
    bad = len(rows) - len(good)
    with pytest.raises(UserError) as raised:
        prepare(configure(tmp_path, str(path), skip=False, task=task))
    said = str(raised.value)
    assert f"{path}, {message}" in said
    assert f"of {len(rows)} records" in said
    assert said.endswith(": data.bad_records=skip leaves them out")
    assert "\n" not in said
    store = store_of(prepare(configure(tmp_path, str(path), skip=True, task=task)))
    assert (store.documents, store.counts[LEFT_OUT]) == (len(good), bad)
    listed = store.manifest["statistics"]["bad_records"]
    numbers = [int(line.partition(f"{path}, line ")[2].split()[0].rstrip(":")) for line in listed]
    assert numbers == sorted(set(range(1, len(rows) + 1)) - set(good))
    out = capsys.readouterr().out
    assert all(f"left out: {line}\n" in out for line in listed)
    assert f"{bad} bad records left out" in out
    # what is left is what the file without them gives
    path.write_text(lines(*(rows[number - 1] for number in good)))
    clean = store_of(prepare(configure(tmp_path, str(path), skip=False, task=task)))
    assert clean.of_tokens("ids", 0, clean.tokens).tolist() == store.of_tokens("ids", 0, store.tokens).tolist()
    assert LEFT_OUT not in clean.counts


def test_32_empty_answers_among_2393(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines(*(pair("" if n % 75 == 5 else f"answer {n}") for n in range(2393))))
    task = TaskConfig(name=Task.finetune)
    with pytest.raises(UserError, match=r"line 6: 'completion' is empty.*; 32 of 2,393 records are bad"):
        prepare(configure(tmp_path, str(path), skip=False, task=task))
    store = store_of(prepare(configure(tmp_path, str(path), skip=True, task=task)))
    assert (store.documents, store.counts[LEFT_OUT]) == (2361, 32)
    assert len(store.manifest["statistics"]["bad_records"]) == 10


def test_a_tokenizer_trained_on_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*[GOOD] * 40, "oops", "oops"))
    with pytest.raises(UserError, match=r"line 41 is not JSON .*; 2 of 42 records are bad"):
        prepare(configure(tmp_path, str(path), skip=False, tokenizer=None))
    assert store_of(prepare(configure(tmp_path, str(path), skip=True, tokenizer=None))).documents == 40


@pytest.fixture
def several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 100 records, 3 of them bad and 1 a duplicate, that is read in many pieces."""
    for module in (files, sources):
        monkeypatch.setattr(module, "PIECE_BYTES", 300)
    monkeypatch.setattr(filling, "WORTH_A_PROCESS", 1)
    rows: list[Any] = [{"text": f"document {number} has some words"} for number in range(100)]
    rows[30], rows[55], rows[77], rows[80] = "oops", {"text": 3}, rows[76], {"text": 3}
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*rows))
    (tmp_path / "store").mkdir()
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_they_are_counted_over_all_pieces(tmp_path: Path, several_pieces: Path, processes: int) -> None:
    recipe = Recipe(Corpus.find("data.train", [str(several_pieces)]), TextEncoder(TOKENIZER, 2))
    with pytest.raises(UserError, match=rf"{several_pieces}, line 31 is not JSON .*; 3 of 100 records are bad"):
        fill(tmp_path / "store", [recipe], processes)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_those_left_out_have_the_numbers_of_their_lines(
    tmp_path: Path, several_pieces: Path, deduplicate: bool
) -> None:
    corpus = Corpus.find("data.train", [str(several_pieces)], skip_bad=True)
    metas = fill(tmp_path / "store", [Recipe(corpus, TextEncoder(TOKENIZER, 2), corpus.text, None, deduplicate)], 1)
    told = [line.partition(f"{several_pieces}, ")[2].partition(" is ")[0] for meta in metas for line in meta.bad]
    assert told == ["line 31", "line 56: 'text'", "line 81: 'text'"]
    assert sum(meta.part.documents for meta in metas) == 97 - deduplicate
    assert sum(meta.counts.get(LEFT_OUT, 0) for meta in metas) == 3
    assert not list(tmp_path.glob("store/bad-*"))


def test_what_is_held_out_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*({"text": f"document {n}"} if n % 10 else "oops" for n in range(100))))
    prepared = prepare(configure(tmp_path, str(path), skip=True, held_out=0.3))
    assert prepared.validation is not None
    train, held_out = store_of(prepared), TokenStore(prepared.validation)
    assert train.documents + held_out.documents == 90
    assert (train.counts[LEFT_OUT], held_out.counts.get(LEFT_OUT, 0)) == (10, 0)


@pytest.mark.parametrize("skip", [False, True])
def test_a_stream(tmp_path: Path, skip: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [{"text": f"document {number} has some words"} for number in range(60)]
    rows[20], rows[40] = "oops", {"text": None}
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*rows))
    run = configure(tmp_path, [{"path": str(path), "stream": True}], skip=skip)
    prepared = prepare(run)
    if not skip:
        with pytest.raises(UserError, match=r"line 21 is not JSON .*; data.bad_records=skip leaves such records out"):
            tasks.fill_streams(run, prepared, Clock())
        return
    tasks.fill_streams(run, prepared, Clock())
    out = capsys.readouterr().out
    assert "58 documents" in out
    assert "2 bad records left out" in out
    assert f"left out: data.train: {path}, line 21 is not JSON" in out
    mixture = tasks.open_mixture(run, prepared, Clock())
    [mixture.sample(position).ids for position in range(16)]
    store = store_of(prepared)
    assert (store.documents, store.counts[LEFT_OUT]) == (58, 2)
    out = capsys.readouterr().out
    assert f"left out: data.train: {path}, line 21 is not JSON" in out
    assert f"left out: data.train: {path}, line 41: 'text' is None" in out


def test_nothing_but_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines({"body": "a"}, {"body": "b"}))
    with pytest.raises(UserError, match=r"there is no text in .*; left out: .*, line 1 has no field 'text'"):
        prepare(configure(tmp_path, str(path), skip=True))
    task = TaskConfig(name=Task.classify)
    with pytest.raises(UserError, match=r"2 of 2 records are bad: .*line 1 has no field 'label'"):
        prepare(configure(tmp_path, str(path), skip=True, task=task))


def test_what_is_left_tells_nothing_apart(tmp_path: Path) -> None:
    """Who skips bad records already is not told to skip them."""
    (tmp_path / "text.jsonl").write_text(lines(label("a"), label("???"), label("a")))
    with pytest.raises(
        UserError, match=r"all labels are 'a', .*; 1 of 3 records are bad: .*, line 2: the label '"
    ) as caught:
        prepare(configure(tmp_path, str(tmp_path / "text.jsonl"), True, TaskConfig(name=Task.classify)))
    assert "skip" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cut", "array", "quote"])
def test_a_damaged_file_is_no_bad_record(tmp_path: Path, kind: str) -> None:
    name, content = {
        "cut": ("a.jsonl.gz", gzip.compress(lines(*[GOOD] * 99).encode())[:-9]),
        "array": ("a.json", b'[{"text": "a"}, oops]'),
        "quote": ("a.csv", b'text,n\na,1\n"b,2\nc,3\n'),
    }[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}(, item 2| is not a complete|, line 3 is malformed)"):
        prepare(configure(tmp_path, str(tmp_path / name), skip=True))


def test_what_rust_panics_at_is_one_line() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(0)
    with pytest.raises(UserError, match=r"data.tokenizer .*chunk size must be non-zero"):
        encode_documents(tokenizer, ["a"])


def test_an_error_that_no_other_process_can_read() -> None:
    try:
        pre_tokenizers.FixedLength(0).pre_tokenize_str("a")
    except BaseException as error:
        told = _portable(error)
    assert str(pickle.loads(pickle.dumps(told))) == "PanicException: chunk size must be non-zero"
    assert "pre_tokenize_str" in told.__notes__[0]
