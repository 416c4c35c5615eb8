"""Labelled texts: the ids that AutoTokenizer gives, labels of every kind, and what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer

from opt_parallel.config.model import Labels, ModelConfig, ProblemType
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.config.task import Task, TaskConfig, Truncation
from opt_parallel.data.encode.classify import LabelledEncoder, find_labels
from opt_parallel.data.encode.tokenizer import check_padding, save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import prepare
from opt_parallel.data.samples.batches import validation_batches
from opt_parallel.data.samples.samples import Labelled, collate
from opt_parallel.data.store.store import PartWriter, TokenStore, write_manifest
from opt_parallel.data.text.records import Record
from opt_parallel.runtime.errors import UserError

SINGLE, MULTI = ProblemType.single_label_classification, ProblemType.multi_label_classification
REGRESSION = ProblemType.regression
TEXTS = ["A fine film, and long.", " It ends </s> badly;", "déjà vu 🙂"]
COLORS = Labels(("blue", "red"), SINGLE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def task(**settings: Any) -> TaskConfig:
    return TaskConfig(name=Task.classify, **settings)


def records(labels: list[Any], **fields: list[Any]) -> list[Record]:
    columns = {"text": [f"Sentence {number}." for number in range(len(labels))], **fields, "label": labels}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [Record(f"data.train: a.jsonl, line {number}", row) for number, row in enumerate(rows, start=1)]


def encoder(tokenizer: Tokenizer, found: Labels, length: int = 64, **settings: Any) -> LabelledEncoder:
    return LabelledEncoder(tokenizer, 2, "text", task(**settings), found, length)


def documents(encoded: Any) -> list[list[int]]:
    ends = np.cumsum(encoded.columns["lengths"])[:-1]
    return [part.tolist() for part in np.split(encoded.columns["ids"], ends)]


def test_ids_are_those_of_transformers_on_what_we_save(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)  # text that spells </s> stays text
    labels: list[Any] = ["red", "blue", "red"]
    alone = encoder(tokenizer, COLORS).encode(records(labels, text=TEXTS))
    assert documents(alone) == [theirs(text).input_ids for text in TEXTS]
    assert alone.columns["label"].tolist() == [1, 0, 1]
    other = TEXTS[::-1]
    pairs = encoder(tokenizer, COLORS, pair_field="other").encode(records(labels, text=TEXTS, other=other))
    assert documents(pairs) == [theirs(*pair).input_ids for pair in zip(TEXTS, other, strict=True)]
    assert not alone.counts
    assert not pairs.counts


@pytest.mark.parametrize("truncation", Truncation)
def test_what_is_too_long_is_cut_and_counted(tokenizer: Tokenizer, truncation: Truncation) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def cut(text: str, size: int) -> list[int]:
        whole = ids(text)
        return whole[:size] if truncation is Truncation.keep_start else whole[len(whole) - size :]

    long, short = "Some words that are long. " * 4, "ends"
    size = len(ids(short))
    labels: list[Any] = ["red"] * 3
    alone = encoder(tokenizer, COLORS, length=9, truncation=truncation)
    encoded = alone.encode(records(labels[:2], text=[long, short]))
    assert documents(encoded) == [[2, *cut(long, 8)], [2, *ids(short)]]
    assert encoded.counts == {"cut to data.sequence_length=9": 1}
    two = encoder(tokenizer, COLORS, length=15, truncation=truncation, pair_field="other")
    encoded = two.encode(records(labels, text=[long, long, short], other=[long, short, long]))
    assert size < 6
    assert documents(encoded) == [
        [2, *cut(long, 6), 2, *cut(long, 7)],
        [2, *cut(long, 13 - size), 2, *ids(short)],
        [2, *ids(short), 2, *cut(long, 13 - size)],
    ]
    assert encoded.counts == {"cut to data.sequence_length=15": 3}


def test_empty_texts_are_counted(tokenizer: Tokenizer) -> None:
    encoded = encoder(tokenizer, COLORS).encode(records(["red", "blue"], text=[" \n", "word"]))
    assert encoded.counts == {"empty documents left out": 1}
    assert encoded.columns["label"].tolist() == [0]


KINDS: dict[str, tuple[dict[str, Any], list[Any], Labels]] = {
    "names": ({}, ["b", "a", "b"], Labels(("a", "b"), SINGLE)),
    "whole numbers": ({}, [10, 2, 2], Labels(("2", "10"), SINGLE)),
    "numbers as text": ({}, ["10", "2"], Labels(("2", "10"), SINGLE)),
    "truth": ({}, [True, False], Labels(("false", "true"), SINGLE)),
    "lists": ({}, [["b"], [], ["a", "b"]], Labels(("a", "b"), MULTI)),
    "numbers": ({}, [1.5, 2, 0.25], Labels(("LABEL_0",), REGRESSION)),
    "several numbers": ({}, [[1.5, 2], [0, 1]], Labels(("LABEL_0", "LABEL_1"), REGRESSION)),
    "marks": ({"problem_type": REGRESSION}, [1, 5], Labels(("LABEL_0",), REGRESSION)),
    "marks as text": ({"problem_type": REGRESSION}, ["1", "4.5"], Labels(("LABEL_0",), REGRESSION)),
    "named": ({"labels": ["b", "a", "c"]}, ["a"], Labels(("b", "a", "c"), SINGLE)),
}
VALUES = {
    "names": [1, 0, 1],
    "whole numbers": [1, 0, 0],
    "numbers as text": [1, 0],
    "truth": [1, 0],
    "lists": [[0, 1], [0, 0], [1, 1]],
    "numbers": [[1.5], [2], [0.25]],
    "several numbers": [[1.5, 2], [0, 1]],
    "marks": [[1], [5]],
    "marks as text": [[1], [4.5]],
    "named": [1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_labels_of_the_data(tokenizer: Tokenizer, kind: str, tmp_path: Path) -> None:
    settings, values, expected = KINDS[kind]
    rows = records(values)
    found = find_labels(task(**settings), iter(rows))
    assert found == expected
    each = encoder(tokenizer, found, **settings)
    writer = PartWriter(tmp_path / "part-00000", each.columns)
    writer.write(each.encode(rows))
    write_manifest(tmp_path, each.columns, [writer.close()], {})
    samples = Labelled(TokenStore(tmp_path))
    assert len(samples) == len(values)
    batch = collate([samples.sample(number) for number in range(len(samples))], range(len(samples)), 1)
    assert batch.labels.tolist() == VALUES[kind]
    assert batch.labels.dtype is (torch.int64 if expected.problem_type is SINGLE else torch.float32)
    assert batch.targets == len(values)
    filled = list(validation_batches(samples, 2, 0, 2))
    assert sum(each.targets for each in [*filled, *validation_batches(samples, 2, 1, 2)]) == len(values)


WRONG: dict[str, tuple[dict[str, Any], Labels | None, list[Any], str]] = {
    "outside the list": ({}, COLORS, ["red", "green"], "line 2: the label 'green' is not one of blue, red"),
    "outside, in a list": ({}, Labels(("a",), MULTI), [["a", "b"]], "line 1: the label 'b' is not one of a"),
    "a name among lists": ({}, Labels(("a",), MULTI), ["a"], "line 1: the label 'a' is not a list of names"),
    "a list among names": ({}, COLORS, [["red"]], "line 1: the label .'red'. is not one name"),
    "no number": ({}, Labels(("x",), REGRESSION), [1.0, "high"], "line 2: the label 'high' is not a number"),
    "not finite": ({}, Labels(("x",), REGRESSION), [float("nan")], "line 1: the label nan is not a number"),
    "too few numbers": ({}, Labels(("x", "y"), REGRESSION), [[1.0]], r"line 1: the label \[1.0\] is not 2 numbers"),
    "none": ({}, None, ["red", None], "line 2 has an empty field 'label'"),
    "missing": ({"label_field": "color"}, None, ["red"], r"line 1 has no field 'color' among \['text', 'label'\]"),
    "mixed": ({}, None, ["red", 3], "line 1: the label is a name, but a.jsonl, line 2 has a whole number"),
    "mixed with lists": ({}, None, ["red", ["red"]], "line 2: the label is a list, but a.jsonl, line 1 has a name"),
    "an object": ({}, None, [{"a": 1}], "line 1: the label {'a': 1} is neither a name nor a number"),
    "one alone": ({}, None, ["red", "red"], "all labels are 'red', so there is nothing to learn"),
    "too many": ({}, None, [f"text {number}" for number in range(10_001)], "more than 10,000 different labels"),
    "no text": ({"pair_field": "other"}, COLORS, ["red"], "line 1 has no field 'other': set data.text_field"),
}


def read(tokenizer: Tokenizer, settings: dict[str, Any], labels: Labels | None, values: list[Any]) -> None:
    if labels is None:
        find_labels(task(**settings), iter(records(values)))
    else:
        encoder(tokenizer, labels, **settings).encode(records(values))


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line(tokenizer: Tokenizer, mistake: str) -> None:
    settings, labels, values, line = WRONG[mistake]
    with pytest.raises(UserError, match=line) as caught:
        read(tokenizer, settings, labels, values)
    assert "\n" not in str(caught.value)


def test_no_room_and_padding_that_is_a_word(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"sequence_length=3 has no room for a text: it must be at least 4"):
        encoder(tokenizer, COLORS, length=3, pair_field="other")
    check_padding(tokenizer, ModelConfig())
    with pytest.raises(UserError, match=r"model\.pad_token_id=40 is the word"):
        check_padding(tokenizer, ModelConfig(pad_token_id=40))


def test_as_many_labels_as_tokens_are_no_tokens_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    names = Labels(tuple("abc"), MULTI)
    each = encoder(tokenizer, names, length=3)
    writer = PartWriter(tmp_path / "part-00000", each.columns)
    writer.write(each.encode(records([["a"], ["c"]])))
    write_manifest(tmp_path, each.columns, [writer.close()], {})
    samples = Labelled(TokenStore(tmp_path))
    batch = collate([samples.sample(0), samples.sample(1)], range(2), 1)
    assert batch.ids.shape == batch.labels.shape == (2, 3)
    assert batch.labels.dtype is torch.float32
    assert batch.labels.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_names_that_the_data_declare_keep_their_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """All of a `ClassLabel`'s, whether they occur or not; what occurs beside them follows."""
    named = {"names": ["positive", "neutral", "negative"], "_type": "ClassLabel"}
    table = pyarrow.table({"text": TEXTS, "label": [2, 0, 2]})
    told = json.dumps({"info": {"features": {"label": named}}})
    parquet.write_table(table.replace_schema_metadata({"huggingface": told}), tmp_path / "a.parquet")
    save_tokenizer(tokenizer, tmp_path / "tokenizer")

    def labels(*paths: Path) -> tuple[Labels, list[int]]:
        settings = {"tokenizer": str(tmp_path / "tokenizer"), "sequence_length": 32, "held_out": 0.0, "workers": 1}
        data = DataConfig(train=[str(path) for path in paths], cache=str(tmp_path / "cache"), **settings)
        model = ModelConfig(vocab_size=300, max_position_embeddings=64)
        prepared = prepare(Run(model=model, data=data, task=task(), batch={"global": 1, "micro": 1}))
        assert prepared.labels is not None
        return prepared.labels, TokenStore(prepared.train[0].store).of_documents("label").tolist()

    assert labels(tmp_path / "a.parquet") == (Labels(("positive", "neutral", "negative"), SINGLE), [2, 0, 2])
    more = tmp_path / "b.jsonl"
    more.write_text('{"text": "a", "label": "mixed"}\n{"text": "b", "label": "neutral"}\n')
    assert labels(tmp_path / "a.parquet", more) == (
        Labels(("positive", "neutral", "negative", "mixed"), SINGLE),
        [2, 0, 2, 3, 1],
    )


def test_numbers_beyond_any_float(tokenizer: Tokenizer) -> None:
    digits = int("9" * 401)
    with pytest.raises(UserError, match=r"line 2: the label 9999.* is not a number, which regression needs"):
        encoder(tokenizer, Labels(("LABEL_0",), REGRESSION)).encode(records([0.5, digits]))
    assert find_labels(task(), records([digits, 1])).names == ("1", str(digits))
    names = ["9" * 5000, "8"]  # more digits than Python reads
    assert find_labels(task(), records(names)).names == ("8", names[0])
    with pytest.raises(UserError, match="is half of a surrogate pair"):
        find_labels(task(), records(["a", "\ud800"]))
