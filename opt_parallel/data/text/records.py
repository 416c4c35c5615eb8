"""Defines the records of the user's data and their text. A bad record is an error, or is left out and counted."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opt_parallel.runtime.errors import UserError, one_line

LISTED = 10  # Maximum number of bad records whose messages are printed.
LONGEST_NAMES = 200  # Maximum number of characters for the names of a record's fields in a message.
LEFT_OUT = "bad records left out"
IDS = "input_ids"  # The usual name of a field with token ids.


@dataclass(frozen=True)
class Record:
    """A row of the user's data. `fields` maps the names of its fields to values. `where` is its location in messages.

    A file that is one document, such as a .txt file, is a record with one field, whose name is `data.text_field`."""

    where: str
    fields: Mapping[str, Any]

    @property
    def names(self) -> str:
        """The names of the record's fields, for messages."""
        names = str(list(self.fields))
        return names if len(names) <= LONGEST_NAMES else f"{names[:LONGEST_NAMES]}…"


class BadRecord(UserError):
    """The error for a record that cannot be used. The error message starts with the location of the record.

    Reading can continue after the record."""


def require_good(condition: bool, message: str) -> None:
    """Raise `BadRecord(message)` unless `condition` holds."""
    if not condition:
        raise BadRecord(message)


Item = Record | BadRecord  # readers yield a BadRecord for an invalid record, and continue after it


@dataclass(frozen=True)
class Text:
    """Extracts the text of a record from `field`, or from several fields by the format string `template`."""

    field: str = "text"
    template: str | None = None

    def ids_of(self, record: Record) -> np.ndarray | None:
        """The token ids (tokens,) int64 of a record whose field has ids instead of text, or None. Raises: BadRecord."""
        value = record.fields.get(self.field) if self.template is None else None
        if not isinstance(value, (list, np.ndarray)):
            return None
        ids = np.asarray(value) if len(value) else np.zeros(0, np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise BadRecord(f"{record.where}: {self.field!r} is {value!s:.40}, not a list of token ids")
        return ids.astype(np.int64)

    def of(self, record: Record) -> str:
        """The text of `record`. Raises: BadRecord."""
        if self.template is None:
            value = self._value(record, self.field)
            if isinstance(value, (list, np.ndarray)):
                raise BadRecord(
                    f"{record.where}: {self.field!r} is a list, not a string: lists of token ids are read by "
                    "task=pretrain with data.tokenizer, the tokenizer of these ids"
                )
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
            except (ValueError, KeyError, OverflowError) as error:  # for example, the field of {score:.2f} is a string
                fix = f"{self._wanted}, in a format that suits it"
                raise BadRecord(f"{record.where}: {one_line(error)}: {fix}") from error
        if not text.isascii():
            require_characters(text, record.where)
        return text

    def _value(self, record: Record, name: str) -> Any:
        if name not in record.fields:
            wanted = f"set data.text_field={IDS} to read its token ids" if IDS in record.fields else self._wanted
            raise BadRecord(f"{record.where} has no field {name!r}, only {record.names}: {wanted}")
        return record.fields[name]

    @property
    def _names(self) -> list[str]:
        return [name for _, name, _, _ in string.Formatter().parse(self.template or "") if name]

    @property
    def _wanted(self) -> str:
        if self.template is None and self.field == IDS:
            return "write its token ids as a list, or leave the record out"
        if self.template is None:
            return f"set data.text_field={self.field} to the field that holds the text"
        return f"data.template={self.template!r} needs text or a number in each of its fields"


def require_characters(text: str, where: str) -> None:
    """Raise BadRecord if `text` has a lone surrogate, which JSON allows. The message starts with the text `where`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{where}: {error.object[error.start]!r} is half of a surrogate pair, so it is no character: remove it"
        ) from error


@dataclass
class BadRecords:
    """The number of bad records among `seen` records, and the messages of the `first` bad records."""

    seen: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: BadRecord) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(str(error))

    def seek(self, items: Iterable[Item], check: Callable[[Record], Any]) -> None:
        """Count the items that are bad records or for which `check` raises BadRecord."""
        for _ in sift(items, check, self):
            pass

    def refusal(self) -> UserError:
        """An error with the message of the first bad record and the total number of bad records."""
        are = "is" if self.count == 1 else "are"
        return UserError(
            f"{self.first[0]}; {self.count:,} of {self.seen:,} records {are} bad: data.bad_records=skip leaves them out"
        )


def sift(items: Iterable[Item], check: Callable[[Record], Any], bad: BadRecords | None) -> Iterator[Record]:
    """The records among `items` for which `check` raises no BadRecord. The other items are added to `bad`.

    If `bad` is None, the first item that is a BadRecord is raised as an error, and `check` is not called."""
    for item in items:
        if bad is None:
            if isinstance(item, BadRecord):
                raise item
            yield item
            continue
        bad.seen += 1
        try:
            if isinstance(item, BadRecord):
                raise item
            check(item)
        except BadRecord as error:
            bad.add(error)
        else:
            yield item
