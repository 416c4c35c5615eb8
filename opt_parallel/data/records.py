"""Rows of the user's data, and those of them that cannot be used: an error, or left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_parallel.errors import UserError

LISTED = 10  # bad records that are told one by one
LONGEST_NAMES = 200  # characters of what a message says of a record's fields
LEFT_OUT = "bad records left out"


@dataclass(frozen=True)
class Record:
    """A row of the user's data, or a whole file of text as `{"text": …}`; `where` it stands, for messages."""

    where: str
    fields: Mapping[str, Any]

    @property
    def names(self) -> str:
        """The names of its fields, for messages."""
        names = str(list(self.fields))
        return names if len(names) <= LONGEST_NAMES else f"{names[:LONGEST_NAMES]}…"


class BadRecord(UserError):
    """A record that cannot be used, while those beside it can. The message begins with where it stands."""


def require_good(condition: bool, message: str) -> None:
    """Raise `BadRecord(message)` unless `condition` holds."""
    if not condition:
        raise BadRecord(message)


Item = Record | BadRecord  # what a reader yields: it goes on after a bad record


@dataclass
class BadRecords:
    """How many of `seen` records were bad, and the messages of the first."""

    seen: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: BadRecord) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(str(error))

    def seek(self, items: Iterable[Item], check: Callable[[Record], Any]) -> None:
        """Add those of `items` that cannot be read or that `check` raises BadRecord for."""
        for _ in sift(items, check, self):
            pass

    def refusal(self) -> UserError:
        """The error that says how many there are in all."""
        are = "is" if self.count == 1 else "are"
        return UserError(
            f"{self.first[0]}; {self.count:,} of {self.seen:,} records {are} bad: data.bad_records=skip leaves them out"
        )


def sift(items: Iterable[Item], check: Callable[[Record], Any], bad: BadRecords | None) -> Iterator[Record]:
    """The records that can be read and that `check` raises no BadRecord for; the others are added to `bad`.

    Where `bad` is None the first unreadable one is raised, and nothing is checked."""
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
