"""Corpora that the real programs write. A program that is not installed skips its test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from id_runs import losses

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.data.encode.tokenizer import encode_documents, save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import prepare
from opt_parallel.data.store.store import TokenStore

TEXTS = [f"document {number} has some words, and no more" + " again" * (number % 9) for number in range(40)]
TOKENIZER = train_tokenizer(TEXTS, 300)
DOCUMENTS, END = encode_documents(TOKENIZER, TEXTS), 2


def megatron(folder: Path, end: list[int]) -> Path:
    """`pip install --no-deps megatron-core`"""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    import torch

    builder = indexed.IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
    for ids in DOCUMENTS:
        builder.add_item(torch.tensor([*ids, *end]))
        builder.end_document()
    builder.finalize(str(folder / "megatron.idx"))
    return folder / "megatron.idx"


def datatrove(folder: Path, end: list[int]) -> Path:
    """`pip install --no-deps datatrove humanize loguru multiprocess dill`"""
    written = pytest.importorskip("datatrove.pipeline.tokens.tokenizer", exc_type=ImportError)
    file = written.TokenizedFile(str(folder), "datatrove.ds", save_final_metadata=True, token_size=4)
    for ids in DOCUMENTS:
        file.write([*ids, *end], None)
    file.close()
    return folder / "datatrove.ds"


def saved_dataset(folder: Path, end: list[int]) -> Path:
    import datasets

    datasets.Dataset.from_dict({"input_ids": [[*ids, *end] for ids in DOCUMENTS]}).save_to_disk(folder / "saved")
    return folder / "saved"


def parquet(folder: Path, end: list[int]) -> Path:
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([[*ids, *end] for ids in DOCUMENTS], pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": column}), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("end", [[], [END]])
@pytest.mark.parametrize("write", [megatron, datatrove, saved_dataset, parquet])
def test_the_tokens_are_those_of_the_text(
    write: Callable[[Path, list[int]], Path], end: list[int], tmp_path: Path
) -> None:
    def tokens(path: Path, **data: Any) -> list[int]:
        data |= {"tokenizer": str(tmp_path / "tokenizer"), "cache": str(tmp_path / "cache"), "sequence_length": 16}
        model = ModelConfig(vocab_size=300, max_position_embeddings=16)
        store = TokenStore(
            prepare(Run(model=model, data=DataConfig(train=str(path), workers=1, **data))).train[0].store
        )
        return store.of_tokens("ids", 0, store.tokens).tolist()

    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert tokens(write(tmp_path, end), text_field="input_ids") == tokens(tmp_path / "text.jsonl")


def numpy(folder: Path, end: list[int]) -> Path:
    """NumPy's file has no index, so an end follows each document."""
    np.save(folder / "array.npy", np.array([token for ids in DOCUMENTS for token in [*ids, END]], np.uint16))
    return folder / "array.npy"


@pytest.mark.long
def test_the_losses_are_those_of_the_text(tmp_path: Path) -> None:
    """20 steps from each corpus, from two mixed ones, and resumed at another tensor degree, bit for bit."""
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    files = {write.__name__: write(tmp_path, []) for write in (megatron, datatrove, saved_dataset, parquet, numpy)}
    wanted = losses(tmp_path, str(text))
    assert len(set(wanted)) == len(wanted)
    for name, path in files.items():
        field = ["data.text_field=input_ids"] if name in ("saved_dataset", "parquet") else []
        assert losses(tmp_path, str(path), *field) == wanted, name
    pairs = [(text, text), (files["megatron"], files["datatrove"]), (files["numpy"], files["megatron"])]
    mixtures = [f"[{{path: {one}, name: a, weight: 2}}, {{path: {two}, name: b}}]" for one, two in pairs]
    straight, *others = [losses(tmp_path, each, layouts=(1, 2)) for each in mixtures]
    assert others == [straight] * 2
    assert straight != wanted
