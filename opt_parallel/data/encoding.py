"""From records to token ids: what a task makes of the text, in batches, alike in any process."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.data.store import LENGTHS, Column, Encoded, ids_column
from opt_parallel.data.tokens import count_tokens, encode_documents
from opt_parallel.errors import UserError

PART_CHARACTERS = 1 << 18  # a longer document is encoded in parts
EMPTY = "empty documents left out"


@dataclass(frozen=True)
class Record:
    """A row of the user's data, or a whole file of text as `{"text": …}`; `where` it stands, for messages."""

    where: str
    fields: Mapping[str, Any]


def text_of(record: Record, field: str) -> str:
    """The document that a record holds. Raises: UserError."""
    where = record.where
    if field not in record.fields:
        raise UserError(f"{where} has no field {field!r}, only {list(record.fields)}: set data.text_field")
    text = record.fields[field]
    expected = f'each line must be an object such as {{"{field}": "…"}} (data.text_field={field})'
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is {text!r:.40}, not a string: {expected}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error.object[error.start]!r} is half a character: remove it") from error
    return text


class Encoder(Protocol):
    """A task's way from records to columns. It travels to other processes, so it must pickle; what `identity` returns
    joins the fingerprint of the store."""

    columns: dict[str, Column]

    def identity(self) -> list[Any]: ...

    def encode(self, records: list[Record]) -> Encoded:
        """Raises: UserError that begins with a record's `where`."""
        ...


class TextEncoder:
    """Pretraining's: documents, white space at their ends removed, each followed by the token `end`."""

    def __init__(self, tokenizer: Tokenizer, end: int, field: str = "text") -> None:
        self.tokenizer, self.end, self.field = tokenizer, end, field
        self.columns = {"ids": ids_column(count_tokens(tokenizer)), "lengths": LENGTHS}

    def identity(self) -> list[Any]:
        return ["text", self.tokenizer.to_str(), self.end]

    def encode(self, records: list[Record]) -> Encoded:
        texts = [text for record in records if (text := text_of(record, self.field).rstrip())]
        parts = [list(_parts(text)) for text in texts]
        ids = iter(encode_documents(self.tokenizer, [part for each in parts for part in each]))
        documents = [[token for _ in each for token in next(ids)] + [self.end] for each in parts]
        counts = Counter({EMPTY: len(records) - len(texts)} if len(texts) < len(records) else {})
        return Encoded(columns_of(documents), counts)


def columns_of(documents: list[list[int]]) -> dict[str, np.ndarray]:
    """`ids` and `lengths` of some documents."""
    lengths = np.array([len(ids) for ids in documents], np.int64)
    ids = np.fromiter((token for ids in documents for token in ids), np.int64, int(lengths.sum()))
    return {"ids": ids, "lengths": lengths}


def _parts(document: str) -> Iterator[str]:
    """Parted before white space that follows a word, which no byte-level token spans: the same tokens, less memory."""
    start, gap = 0, re.compile(r"(?<=\S)[ \n]")
    while cut := gap.search(document, start + PART_CHARACTERS):
        yield document[start : cut.start()]
        start = cut.start()
    yield document[start:]
