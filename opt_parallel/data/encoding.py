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

PART_CHARACTERS = 1 << 18  # a longer document is encoded in parts
EMPTY = "empty documents left out"


@dataclass(frozen=True)
class Record:
    """A row of the user's data, or a whole file of text as `{"text": …}`; `where` it stands, for messages."""

    where: str
    fields: Mapping[str, Any]


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

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.columns = {"ids": ids_column(count_tokens(tokenizer)), "lengths": LENGTHS}

    def identity(self) -> list[Any]:
        return ["text", self.tokenizer.to_str(), self.end]

    def encode(self, records: list[Record]) -> Encoded:
        texts = [text for record in records if (text := record.fields["text"].rstrip())]
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
