"""From records to token ids: what a task makes of the text, in batches, alike in any process."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.data.records import BadRecord, Item, Record
from opt_parallel.data.store import LENGTHS, Column, Encoded, ids_column
from opt_parallel.data.tokens import encode_documents
from opt_parallel.data_config import SpecialTokens
from opt_parallel.errors import one_line
from opt_parallel.hf_tokenizer import count_tokens

PART_CHARACTERS = 1 << 18  # a longer document is encoded in parts
BATCH_CHARACTERS = 1 << 20  # text encoded at a time; tokens with their bookkeeping take many times its size
EMPTY = "empty documents left out"


class Encoder(Protocol):
    """A task's way from records to columns. It travels to other processes, so it must pickle; what `identity` returns
    joins the fingerprint of the store."""

    columns: dict[str, Column]

    def identity(self) -> list[Any]: ...

    def check(self, record: Record) -> Any:
        """Raise BadRecord, which begins with its `where`, if a record is not as the task needs it."""
        ...

    def encode(self, records: list[Record]) -> Encoded:
        """Raises: BadRecord."""
        ...


@dataclass(frozen=True)
class Text:
    """Where the text of a record is: in `field`, or in several, as `template` puts them together."""

    field: str = "text"
    template: str | None = None

    def of(self, record: Record) -> str:
        """The text of `record`. Raises: BadRecord."""
        if self.template is None:
            value = self._value(record, self.field)
            if not isinstance(value, str):
                raise BadRecord(f"{record.where}: {self.field!r} is {value!r:.40}, not a string: {self._wanted}")
            text = value
        else:
            values = {}
            for name in self._names:
                values[name] = self._value(record, name)
                if not isinstance(values[name], (str, int, float)):
                    raise BadRecord(f"{record.where}: {name!r} is {values[name]!r:.40}: {self._wanted}")
            try:
                text = self.template.format(**values)
            except (ValueError, KeyError, OverflowError) as error:  # of a format in it, such as {score:.2f}
                fix = f"{self._wanted}, in a format that suits it"
                raise BadRecord(f"{record.where}: {one_line(error)}: {fix}") from error
        if not text.isascii():
            require_characters(text, record.where)
        return text

    def _value(self, record: Record, name: str) -> Any:
        if name not in record.fields:
            raise BadRecord(f"{record.where} has no field {name!r}, only {record.names}: {self._wanted}")
        return record.fields[name]

    @property
    def _names(self) -> list[str]:
        return [name for _, name, _, _ in string.Formatter().parse(self.template or "") if name]

    @property
    def _wanted(self) -> str:
        if self.template is None:
            return f"set data.text_field={self.field} to the field that holds the text"
        return f"data.template={self.template!r} needs text or a number in each of its fields"


def require_characters(text: str, where: str) -> None:
    """Raise BadRecord, which begins with `where`, if there is half of a character in `text`: JSON can say it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{where}: {error.object[error.start]!r} is half a character: remove it") from error


class TextEncoder:
    """Pretraining's: documents, white space at their ends removed, each followed by the token `end`."""

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
        return ["text", self.tokenizer.to_str(), self.end, self.text.field, self.text.template, *how(self.spelled)]

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


def how(spelled: SpecialTokens) -> list[str]:
    """What a store's identity says of special tokens that its text spells: nothing where they are text, as always."""
    return [] if spelled is SpecialTokens.text else ["special tokens"]


def _encoded(texts: list[str], tokenizer: Tokenizer, dtype: str, spelled: SpecialTokens) -> Iterator[np.ndarray]:
    """The ids of each text, some at a time: what the tokenizer hands out is many times larger than the arrays."""
    start = 0
    while start < len(texts):
        stop, characters = start, 0
        while stop < len(texts) and characters < BATCH_CHARACTERS:
            characters += len(texts[stop])
            stop += 1
        for ids in encode_documents(tokenizer, texts[start:stop], spelled):
            yield np.array(ids, dtype)
        start = stop


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


def batches_of(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Records in batches to encode, of about `BATCH_CHARACTERS`, with the bad ones among them."""
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
