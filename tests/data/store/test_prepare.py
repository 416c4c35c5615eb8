"""The stores: the documents as one stream cut into rows, found again while nothing changed, whole or absent."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from command import python
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import EvaluationConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.data.encode import pretrain as encoding
from opt_parallel.data.encode.tokenizer import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import Prepared, in_proportion, prepare
from opt_parallel.data.samples.samples import Rows
from opt_parallel.data.store import cache as module
from opt_parallel.data.store.store import TokenStore
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.errors import UserError

DOCUMENTS = ["the cat sat on the mat", "a second document, somewhat longer than the first one", "déjà vu 🙂"] * 3
LENGTH = 8


def lines(path: Path, documents: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents), encoding="utf-8")
    return path


def configure(folder: Path, vocab_size: int = 300, eos_token_id: int = 2, every: int = 0, **data: Any) -> Run:
    settings = {"sequence_length": LENGTH, "cache": str(folder / "cache"), **data}
    return Run(
        model=ModelConfig(vocab_size=vocab_size, eos_token_id=eos_token_id, max_position_embeddings=128),
        data=DataConfig(**settings),
        evaluation=EvaluationConfig(every=every),
    )


def store_of(prepared: Prepared) -> TokenStore:
    return TokenStore(prepared.train[0].store)


def rows(store: Path | None) -> list[list[int]]:
    assert store is not None
    samples = Rows(TokenStore(store), LENGTH)
    found = [samples.sample(number) for number in range(len(samples))]
    return [[*each.ids.tolist(), int(each.labels[-1])] for each in found]


def tokens_of(store: Path | None) -> list[int]:
    assert store is not None
    opened = TokenStore(store)
    return opened.of_tokens("ids", 0, opened.tokens).tolist()


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
    assert tokens_of(prepared.train[0].store) == tokens
    assert rows(prepared.train[0].store) == cut(tokens)
    assert rows(prepared.validation) == cut(stream(prepared, DOCUMENTS))
    assert store_of(prepared).columns["ids"].dtype == "uint16"
    assert store_of(prepared).of_documents("lengths").sum() == len(tokens)
    size = sum(len(document.rstrip().encode()) for document in documents)
    said = capsys.readouterr()
    assert said.out.startswith(
        f"data.train: 10 documents, {len(tokens)} tokens (0.0 MB, {len(tokens) / size:.3f} tokens a byte), "
        "1 empty documents left out; in "
    )
    assert "data.validation: 9 documents, " in said.out
    assert said.err == ""  # no progress bars


def test_long_documents_and_small_batches_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "some words\n\n\n        and  more   spaces \n\t        here, it's déjà vu\n" * 30
    train = lines(tmp_path / "train.jsonl", [long, *DOCUMENTS, long])
    whole = prepare(configure(tmp_path, train=str(train)))
    monkeypatch.setattr(encoding, "PART_CHARACTERS", 7)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 20)
    parted = prepare(configure(tmp_path, train=str(train), cache=str(tmp_path / "other")))
    expected = stream(whole, [long, *DOCUMENTS, long])
    assert tokens_of(parted.train[0].store) == tokens_of(whole.train[0].store) == expected


def test_a_tokenizer_that_was_brought(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", DOCUMENTS)
    brought = train_tokenizer(["quite other text, " * 9], 290)
    save_tokenizer(brought, tmp_path / "mine")
    for name in ("mine", "mine/tokenizer.json"):
        prepared = prepare(configure(tmp_path, train=str(train), tokenizer=str(tmp_path / name)))
        assert load_tokenizer(str(prepared.tokenizer)).to_str() == brought.to_str()
        assert tokens_of(prepared.train[0].store) == stream(prepared, DOCUMENTS)


def test_a_tokenizer_is_trained_on_all_sources_in_proportion(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", ["the cat sat on the mat"] * 400)
    second = lines(tmp_path / "b.jsonl", ["der hund lag auf dem teppich"] * 20)
    sources = [{"path": str(first)}, {"path": str(second), "weight": 0.5}]
    tokenizer = load_tokenizer(str(prepare(configure(tmp_path, 280, train=sources)).tokenizer))
    assert tokenizer.token_to_id("Ġcat")
    assert tokenizer.token_to_id("lag")  # of the second source alone
    corpora = [Corpus.find("data.train", [str(path)]) for path in (first, second)]
    sampled = [text.startswith("the") for text in in_proportion(corpora, [Fraction(2), Fraction(1)])]
    size = [len(path.read_bytes()) for path in (first, second)]
    assert sampled.count(False) == 20  # all that there is, and twice as much of the other
    assert sampled.count(True) == pytest.approx(2 * size[1] / (size[0] / 400), rel=0.1)


def test_text_in_both_splits_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared, other = lines(tmp_path / "shared.jsonl", DOCUMENTS), lines(tmp_path / "other.jsonl", DOCUMENTS)
    prepare(configure(tmp_path, train=[str(shared), str(other)], validation=str(shared)))
    assert "shared.jsonl is in both data.train and data.validation" in capsys.readouterr().out
    prepare(configure(tmp_path, train=str(other), validation=str(shared)))
    assert "is in both" not in capsys.readouterr().out


def test_splits_of_a_dataset_have_stores_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", DOCUMENTS)
    lines(folder / "validation.jsonl", DOCUMENTS[:3])
    source = {"path": str(folder), "split": "train"}
    prepared = prepare(configure(tmp_path, train=source, validation={**source, "split": "validation"}))
    assert tokens_of(prepared.train[0].store) == stream(prepared, DOCUMENTS)
    assert tokens_of(prepared.validation) == stream(prepared, DOCUMENTS[:3])


def test_done_once_while_nothing_changes(tmp_path: Path) -> None:
    def made() -> dict[str, int]:
        folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
        return {path.name: path.stat().st_ino for path in folders}

    train = lines(tmp_path / "train.jsonl", DOCUMENTS)
    run = configure(tmp_path, train=str(train))
    first = prepare(run)
    once = made()
    assert len(once) == 2
    assert prepare(run) == first
    assert prepare(configure(tmp_path, train=str(train), sequence_length=4)) == first  # cut when it is read
    assert made() == once
    lines(train, [*DOCUMENTS, "more"])
    again = prepare(run)
    assert again.train != first.train
    assert again.tokenizer != first.tokenizer
    assert len(made()) == 4
    os.utime(train, ns=(1, 1))  # same text, another time
    assert (prepare(run).tokenizer, prepare(run).text) == (again.tokenizer, again.text)
    assert len(made()) == 4
    assert prepare(configure(tmp_path, train=str(train), vocab_size=301)).tokenizer != again.tokenizer
    assert prepare(configure(tmp_path, train=str(train), deduplicate=True)).train != prepare(run).train


def test_a_cache_that_is_filled_may_be_read_only(tmp_path: Path) -> None:
    run = configure(tmp_path, train=str(lines(tmp_path / "train.jsonl", DOCUMENTS)))
    first = prepare(run)
    for path in (tmp_path / "cache").glob("*.lock"):
        path.unlink()
    before = sorted((tmp_path / "cache").iterdir())
    assert prepare(run) == first
    assert sorted((tmp_path / "cache").iterdir()) == before  # not even a lock: nothing is written


def test_a_template(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(json.dumps({"title": f"t{n}", "body": each, "n": n}) + "\n" for n, each in enumerate(DOCUMENTS))
    )
    prepared = prepare(configure(tmp_path, train=str(train), template="{title} ({n})\n\n{body}"))
    expected = [f"t{number} ({number})\n\n{each}" for number, each in enumerate(DOCUMENTS)]
    assert tokens_of(prepared.train[0].store) == stream(prepared, expected)
    fails(configure(tmp_path, train=str(train), template="{headline}"), "line 1 has no field 'headline', only")
    with pytest.raises(UserError, match=r"data.template='\{\}' is not a template"):
        configure(tmp_path, train=str(train), template="{}")
    fails(configure(tmp_path, train=str(train), template="{title:.2f}"), "line 1: Unknown format .* that suits it")
    fails(configure(tmp_path, train=str(train), template="{n:{width}}"), "line 1: 'width': .* that suits it")


def test_sources_have_names_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, second = (lines(tmp_path / folder / "text.jsonl", DOCUMENTS) for folder in ("a", "b"))
    with pytest.raises(UserError, match=r"data.train\[1\] has the name 'text' of another source: give it"):
        configure(tmp_path, train=[{"path": str(first)}, {"path": str(second)}])
    named = configure(tmp_path, train=[{"path": str(first)}, {"path": str(second), "name": "more"}])
    assert [source.name for source in prepare(named).train] == ["text", "more"]
    with pytest.raises(UserError, match=r"data.train\[0\].text_field=3 is not a text: put it in quotes"):
        configure(tmp_path, train=[{"path": str(first), "text_field": 3}])


def many(number: int) -> list[str]:
    return [f"document {n} tells of {n * n} and of {n % 7} and nothing more" for n in range(number)]


def test_duplicates_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    lines(tmp_path / "text" / "a.jsonl", [*many(20), " document 3 tells of 9 and of 3 and nothing more\n", *many(5)])
    lines(tmp_path / "text" / "b.jsonl", [*many(30)])
    prepared = prepare(configure(tmp_path, train=str(tmp_path / "text"), deduplicate=True))
    assert tokens_of(prepared.train[0].store) == stream(prepared, many(30))
    assert ", 26 duplicates left out; in " in capsys.readouterr().out
    assert sorted(path.name for path in prepared.train[0].store.iterdir()) == ["part-00000", "store.json"]


def test_documents_are_held_out_by_their_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = many(200)
    train = lines(tmp_path / "train.jsonl", documents)
    prepared = prepare(configure(tmp_path, train=str(train), every=5, held_out=0.1))
    tokenizer = str(prepared.tokenizer)

    def texts(store: Path | None) -> list[str]:
        decoded = load_tokenizer(tokenizer).decode(tokens_of(store), skip_special_tokens=False)
        return decoded.split("</s>")[:-1]

    kept, held_out = texts(prepared.train[0].store), texts(prepared.validation)
    assert sorted(kept + held_out) == sorted(documents)
    assert 8 <= len(held_out) <= 35  # 20 expected: within 3.5 standard deviations
    assert f"{len(held_out)} documents held out for validation" in capsys.readouterr().out
    lines(train, [*reversed(documents), *documents])  # another order, and twice
    again = prepare(configure(tmp_path, train=str(train), every=5, held_out=0.1, tokenizer=tokenizer))
    assert set(texts(again.validation)) == set(held_out)
    assert sorted(texts(again.train[0].store)) == sorted(kept * 2)
    fails(configure(tmp_path, train=str(train), every=5, held_out=1e-9), "data.held_out=1e-09 of .*: raise it")


def test_statistics(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", ["aab", "ba", "c" * 8, "ba", "ba"])
    known = store_of(prepare(configure(tmp_path, 260, train=str(train)))).manifest["statistics"]
    assert known["lengths"] == {"min": 3, "median": 3, "mean": 22 / 5, "p95": 9, "max": 9}
    assert (known["documents"], known["tokens"], known["text_bytes"]) == (5, 22, 17)
    shares = [5 / 22, 4 / 22, 8 / 22, 5 / 22]  # a, b, c and the ends
    assert known["unigram_entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares), rel=1e-12)
    assert known["examples"] == ["aab</s>", "ba</s>", "cccccccc</s>"]


def fails(run: Run, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        prepare(run)
    assert "\n" not in str(raised.value)


def test_sources_with_too_little(tmp_path: Path) -> None:
    fails(configure(tmp_path), "data.train is not set")
    fails(configure(tmp_path, train=str(lines(tmp_path / "a.jsonl", ["", " "]))), "there is no text in .*a.jsonl")
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "empty" / name).touch()
    fails(configure(tmp_path, train=str(tmp_path / "empty")), "data.train: there is no text in .*a.txt and 1 more")


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
            results.append(module.build_once(folder, patient))
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
    assert module.build_once(folder, fills.append) == folder  # one that comes later tries anew
    assert len(fills) == 2
    assert not Path(f"{folder}.failed").exists()


def test_a_word_must_not_stand_for_padding(tmp_path: Path) -> None:
    """Its embedding would get no gradient from the text."""
    other = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    other.add_special_tokens(["<|endoftext|>"])
    other.save(str(tmp_path / "tokenizer.json"))
    train = str(lines(tmp_path / "train.jsonl", DOCUMENTS))
    run = configure(tmp_path, 300, 3, train=train, tokenizer=str(tmp_path / "tokenizer.json"))
    fails(run, "model.pad_token_id=1 is the word 'b' of the tokenizer")


def test_the_scripts(tmp_path: Path) -> None:
    """A tokenizer trained, and text prepared with it, as a user does both; transformers loads what is there."""
    from transformers import AutoTokenizer

    train, folder = lines(tmp_path / "train.jsonl", many(50), field="body"), tmp_path / "tokenizer"
    fields = ["--text-field", "body", "--vocab-size", "290"]
    made = python("scripts/train_tokenizer.py", "--input", str(train), *fields, "--output", str(folder))
    assert made.returncode == 0, made.stderr
    again = python("scripts/train_tokenizer.py", "--input", str(train), *fields, "--output", str(folder))
    refused = f"error: --output {folder} exists: remove it or choose another folder\n"
    assert (again.returncode, again.stderr) == (2, refused)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    arguments = ["model=opt-tiny", "data.text_field=body", f"data.train={train}", f"data.cache={tmp_path / 'cache'}"]
    prepared = python("scripts/prepare.py", *arguments, f"data.tokenizer={folder}")
    assert prepared.returncode == 0, prepared.stderr
    store = next(path for path in (tmp_path / "cache").glob("store-*") if path.is_dir())
    ids = [token for text in many(50) for token in [*theirs(text, add_special_tokens=False)["input_ids"], 2]]
    assert tokens_of(store) == ids
    assert f"data.train: 50 documents, {len(ids)} tokens" in prepared.stdout
    assert "unigram entropy" in prepared.stdout
    wrong = python("scripts/prepare.py", *arguments, "data.text_field=text")
    assert wrong.returncode == 2
    assert "line 1 has no field 'text', only ['body']: set data.text_field=text" in wrong.stderr
