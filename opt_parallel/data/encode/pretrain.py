"""Encodes records into token ids, in batches. The result does not depend on the process that encodes a record."""

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

PART_CHARACTERS = 1 << 18  # A document with more characters is encoded in several parts.
BATCH_CHARACTERS = 1 << 20  # Characters that are encoded at a time. The tokenizer needs many times their size.
EMPTY = "empty documents left out"


class Encoder(Protocol):
    """Encodes a task's records into arrays. An encoder must be picklable, because it is sent to other processes.

    `identity` describes the encoding, and is part of the name of a token store's folder."""

    columns: dict[str, Column]

    def identity(self) -> list[Any]: ...

    def check(self, record: Record) -> Any:
        """Raise BadRecord if the task cannot use the record. The error message starts with the record's location."""
        ...

    def encode(self, records: list[Record]) -> Encoded:
        """Encode records into arrays. Raises: BadRecord."""
        ...


class TextEncoder:
    """Encodes documents for pretraining. Trailing white space is removed, and the token `end` follows each document."""

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
    """The part of an encoder's identity that describes `data.special_tokens`, which is empty for the default."""
    return [] if spelled is SpecialTokens.text else ["special tokens"]


def _encoded(texts: list[str], tokenizer: Tokenizer, dtype: str, spelled: SpecialTokens) -> Iterator[np.ndarray]:
    """The ids of each text. Texts are encoded in batches, because the tokenizer's output needs much memory."""
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
    """Split a long document into parts at white space after a word, so that encoding needs less memory.

    No token of a byte-level tokenizer crosses such a point, so the tokens do not change."""
    start, gap = 0, re.compile(r"(?<=\S)[ \n]")
    while cut := gap.search(document, start + PART_CHARACTERS):
        yield document[start : cut.start()]
        start = cut.start()
    yield document[start:]


def batches_of(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Batches of about `BATCH_CHARACTERS` characters for the encoder. Bad records are included."""
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
