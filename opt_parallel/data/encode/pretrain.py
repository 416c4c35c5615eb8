"""Encodes records into token ids, in batches. The result does not depend on the process that encodes a record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.config.data import SpecialTokens
from opt_parallel.data.encode.columns import LENGTHS, Column, Encoded, ids_column
from opt_parallel.data.encode.numbering import mapped
from opt_parallel.data.encode.tokenizer import encode_documents
from opt_parallel.data.text.records import BadRecord, Item, Record, Text
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
    """Encodes documents for pretraining. Trailing white space is removed, and the token `end` follows each document.

    A document may also be given as token ids. Ends that it has at its start or end are not doubled. `table` maps its
    ids to those of the tokenizer if they belong to another tokenizer, see `numbering.py`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        end: int,
        text: Text | None = None,
        spelled: SpecialTokens = SpecialTokens.text,
        table: np.ndarray | None = None,
    ) -> None:
        self.tokenizer, self.end, self.text, self.spelled, self.table = tokenizer, end, text or Text(), spelled, table
        self.tokens = count_tokens(tokenizer)
        self.columns = {"ids": ids_column(self.tokens), "lengths": LENGTHS}

    def identity(self) -> list[Any]:
        text = [self.text.field, self.text.template]
        table = [] if self.table is None else [f"table {crc32(self.table.tobytes()):08x}"]
        return ["text", self.tokenizer.to_str(), self.end, *text, *special_tokens_key(self.spelled), *table]

    def check(self, record: Record) -> None:
        if self._ids(record) is None:
            self.text.of(record)

    def text_of(self, record: Record) -> str:
        """The text of a record, which is decoded if the record has token ids. Raises: BadRecord."""
        ids = self._ids(record)
        return self.text.of(record) if ids is None else self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def encode(self, records: list[Record]) -> Encoded:
        given = [self._ids(record) for record in records]
        texts = [self.text.of(each).rstrip() if ids is None else "" for each, ids in zip(records, given, strict=True)]
        parts = [list(_parts(text)) if text else [] for text in texts]
        dtype = self.columns["ids"].dtype
        pieces = iter(_encoded([part for each in parts for part in each], self.tokenizer, dtype, self.spelled))
        end, ids, lengths = np.array([self.end], dtype), [], []
        for each, own in zip(parts, given, strict=True):
            document = [*islice(pieces, len(each))] if own is None else [own.astype(dtype)]
            if each or (own is not None and len(own)):
                document.append(end)
                ids += document
                lengths.append(sum(map(len, document)))
        counts = Counter({EMPTY: len(records) - len(lengths)} if len(lengths) < len(records) else {})
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        columns = {"ids": np.concatenate([np.empty(0, dtype), *ids]), "lengths": np.array(lengths, np.int64)}
        return Encoded(columns, counts, size)

    def _ids(self, record: Record) -> np.ndarray | None:
        """The token ids of a document without ends around it, or None if the record has text. Raises: BadRecord."""
        ids = self.text.ids_of(record)
        if ids is None or not len(ids):
            return ids
        ids = mapped(ids, record.where, self.tokens, self.table, BadRecord)
        inside = np.nonzero(ids != self.end)[0]
        return ids[inside[0] : inside[-1] + 1] if len(inside) else ids[:0]


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
        characters += 1 + sum(len(value if isinstance(value, (str, np.ndarray)) else str(value)) for value in values)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
