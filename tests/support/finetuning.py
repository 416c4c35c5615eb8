"""Makes fine-tuning examples, and encodes them into a token store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from opt_parallel.config.task import TaskConfig
from opt_parallel.data.encode.columns import Encoded
from opt_parallel.data.encode.finetune import ExampleEncoder
from opt_parallel.data.encode.tokenizer import train_tokenizer
from opt_parallel.data.samples.packing import Examples
from opt_parallel.data.store.store import PartWriter, TokenStore, write_manifest
from opt_parallel.data.text.records import Record

WORDS = "the cat sat on the mat and saw another cat, a dog, 3 birds; hello there, then they said goodbye "


def tokenizer(size: int = 300) -> Tokenizer:
    return train_tokenizer([WORDS * 9], size)


def encode(records: Sequence[Mapping[str, Any]], length: int = 1000, **task: Any) -> Encoded:
    encoder = ExampleEncoder(tokenizer(), 2, TaskConfig(**task), length)
    return encoder.encode([Record(f"line {number}", fields) for number, fields in enumerate(records, start=1)])


def store_of(folder: Path, records: Sequence[Mapping[str, Any]], length: int) -> TokenStore:
    """A token store with the examples of `records` in two parts."""
    encoder = ExampleEncoder(tokenizer(), 2, TaskConfig(), length)
    half, parts = len(records) // 2, []
    for number, some in enumerate((records[:half], records[half:])):
        writer = PartWriter(folder / f"part-{number}", encoder.columns)
        writer.write(encoder.encode([Record("", fields) for fields in some]))
        parts.append(writer.close())
    write_manifest(folder, encoder.columns, parts, {})
    return TokenStore(folder)


def examples_of(folder: Path, records: Sequence[Mapping[str, Any]], length: int, packing: bool) -> Examples:
    return Examples(store_of(folder, records, length), length, packing)


def some_records(count: int = 9) -> list[dict[str, str]]:
    """Prompts and completions of very different lengths, in both orders."""
    words = WORDS.split()
    return [
        {"prompt": " ".join(words[: 1 + 3 * i % 7]), "completion": " " + " ".join(words[i : i + 1 + 5 * i % 8])}
        for i in range(count)
    ]
