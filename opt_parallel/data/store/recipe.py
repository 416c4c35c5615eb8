"""Describes how a corpus becomes a token store: its encoder, and the selection of its documents."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from opt_parallel.data.encode.pretrain import Encoder, TextEncoder
from opt_parallel.data.store.selection import DUPLICATES, HELD_OUT, HeldOut, content_of, identity_of
from opt_parallel.data.text.records import LEFT_OUT, BadRecords, Item, Record, Text, sift
from opt_parallel.data.text.sources import Corpus


@dataclass(frozen=True)
class Recipe:
    """Describes how to turn a corpus into a token store: its encoder and its selection of documents.

    Two documents are duplicates if they have the same text `same`. If `same` is None, all fields must be equal.
    """

    corpus: Corpus
    encoder: Encoder
    same: Text | None = None
    held_out: HeldOut | None = None
    deduplicate: bool = False

    def cache_key(self) -> list[Any]:
        """The key of the token store in the cache, which depends on the content of the text and not on its path."""
        return [self.corpus.cache_key(), *self._processing_key()]

    def identity(self) -> list[Any]:
        """The key of the token store in earlier versions, which depends on paths, sizes and times of the files."""
        return [self.corpus.identity(), *self._processing_key()]

    def _processing_key(self) -> list[Any]:
        selection = identity_of(self.held_out, self.deduplicate)
        return [self.encoder.identity(), selection, *([LEFT_OUT] if self.skip_bad else [])]

    def content(self, record: Record) -> bytes:
        """The bytes of a document that are compared with other documents. Token ids are decoded to their text."""
        if self.same is not None and isinstance(self.encoder, TextEncoder):
            return self.encoder.text_of(record).strip().encode()
        return content_of(record, self.same)

    @property
    def selects(self) -> bool:
        """Whether some documents may be left out."""
        return self.held_out is not None or self.deduplicate

    @property
    def skip_bad(self) -> bool:
        return self.corpus.skip_bad

    def good(self, items: list[Item], bad: BadRecords) -> list[Record]:
        """The records that the encoder accepts.

        With `skip_bad`, the other records are added to `bad`. Without `skip_bad`, this method or the encoder raises an
        error for the first bad record."""
        return list(sift(items, self.encoder.check, bad if self.skip_bad else None))


def chosen(records: list[Record], recipe: Recipe, duplicates: set[int], first: int, counts: Counter[str]) -> list[int]:
    """The indices of the records that belong into the token store. The numbers of others are added to `counts`.

    `first` is the index of the first of the `records` in its piece of the text."""
    if recipe.held_out is not None:
        taken = [recipe.held_out.takes(recipe.content(record)) for record in records]
    else:
        taken = [True] * len(records)
    kept = [number for number, takes in enumerate(taken) if takes and first + number not in duplicates]
    if not all(taken) and recipe.held_out and not recipe.held_out.chosen:
        counts[HELD_OUT] += len(records) - sum(taken)
    if len(kept) < sum(taken):
        counts[DUPLICATES] += sum(taken) - len(kept)
    return kept
