"""Encoders from records to token ids, in batches. The result does not depend on the process that encodes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.config.data import SpecialTokens
from opt_parallel.data.encode.columns import LENGTHS, Column, Encoded, ids_column
from opt_parallel.data.encode.tokenizer import encode_documents
from opt_parallel.data.text.records import Item, Record, Text
from opt_parallel.huggingface.tokenizer import count_tokens

PART_CHARACTERS = 1 << 18  # a longer document is encoded in parts
BATCH_CHARACTERS = 1 << 20  # characters encoded at a time; the tokenizer needs many times their size
EMPTY = "empty documents left out"


class Encoder(Protocol):
    """Encodes a task's records into columns. It is sent to other processes, so it must pickle. `identity` is part
    of the store's fingerprint."""

    columns: dict[str, Column]

    def identity(self) -> list[Any]: ...

    def check(self, record: Record) -> Any:
        """Raise BadRecord, with a message that starts with the record's `where`, if the task cannot use the record."""
        ...

    def encode(self, records: list[Record]) -> Encoded:
        """Encode records into columns. Raises: BadRecord."""
        ...


class TextEncoder:
    """The encoder of pretraining: documents without trailing white space, each followed by the token `end`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        end: int,
        text: Text | None = None,
        spelled: SpecialTokens = SpecialTokens.text,
    ) -> None:
        self.tokenizer, self.end, self.text, self.spelled = tokenizer, end, text or Text(), spelled
        self.columns = {"ids": ids_column(count_tokens(tokenizer)), "lengths": LENGTHS}

    def identity(self) -> list[Any]:
        text = [self.text.field, self.text.template]
        return ["text", self.tokenizer.to_str(), self.end, *text, *special_tokens_key(self.spelled)]

    def check(self, record: Record) -> None:
        self.text.of(record)

    def encode(self, records: list[Record]) -> Encoded:
        texts = [text for record in records if (text := self.text.of(record).rstrip())]
        parts = [list(_parts(text)) for text in texts]
        dtype = self.columns["ids"].dtype
        pieces = iter(_encoded([part for each in parts for part in each], self.tokenizer, dtype, self.spelled))
        end, ids, lengths = np.array([self.end], dtype), [], []
        for each in parts:
            document = [*islice(pieces, len(each)), end]
            ids += document
            lengths.append(sum(map(len, document)))
        counts = Counter({EMPTY: len(records) - len(texts)} if len(texts) < len(records) else {})
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        columns = {"ids": np.concatenate([np.empty(0, dtype), *ids]), "lengths": np.array(lengths, np.int64)}
        return Encoded(columns, counts, size)


def special_tokens_key(spelled: SpecialTokens) -> list[str]:
    """The part of an encoder's identity for `data.special_tokens`; empty for the default, as in earlier versions."""
    return [] if spelled is SpecialTokens.text else ["special tokens"]


def _encoded(texts: list[str], tokenizer: Tokenizer, dtype: str, spelled: SpecialTokens) -> Iterator[np.ndarray]:
    """The ids of each text, in batches, because the tokenizer's output is many times larger than the arrays."""
    start = 0
    while start < len(texts):
        stop, characters = start, 0
        while stop < len(texts) and characters < BATCH_CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        for ids in encode_documents(tokenizer, texts[start:stop], spelled):
            yield np.array(ids, dtype)
        start = stop


def _parts(document: str) -> Iterator[str]:
    """Split a long document before white space after a word. No byte-level token crosses such a point, so the tokens
    stay the same and less memory is needed."""
    start, gap = 0, re.compile(r"(?<=\S)[ \n]")
    while cut := gap.search(document, start + PART_CHARACTERS):
        yield document[start : cut.start()]
        start = cut.start()
    yield document[start:]


def batches_of(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Batches of about `BATCH_CHARACTERS` for the encoder, bad records included."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        values = item.fields.values() if isinstance(item, Record) else ()
        characters += 1 + sum(len(value if isinstance(value, str) else str(value)) for value in values)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
