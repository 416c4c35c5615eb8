"""Which documents a store has: those held out for validation or the others, each text once.

Both go by hashes of the text, so neither the order of files nor the number of processes matters, and copies of a text
go the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt_parallel.data.text.records import Record, Text

DIGEST = 16  # bytes: two different texts share one with a chance of 1 in 10²⁰ among 10⁹
BUCKET = 1 << 22  # hashes compared at a time
DUPLICATES, HELD_OUT = "duplicates left out", "documents held out for validation"


@dataclass(frozen=True)
class HeldOut:
    """A share of the documents by a hash of their text with `seed`; `chosen`: these, else the others."""

    seed: int
    share: float
    chosen: bool

    def takes(self, content: bytes) -> bool:
        """Whether a document is among them."""
        digest = hashlib.blake2b(content, digest_size=8, key=str(self.seed).encode()).digest()
        return (int.from_bytes(digest, "little") < int(self.share * 2**64)) == self.chosen


def content_of(record: Record, text: Text | None) -> bytes:
    """What makes a document the same as another: its text without the space around it; `text` None: every field."""
    if text is not None:
        return text.of(record).strip().encode()
    return json.dumps(dict(record.fields), sort_keys=True, default=str).encode()


def digests_of(contents: Iterable[bytes]) -> np.ndarray:
    """Hashes of documents: (documents, 2) uint64."""
    digests = b"".join(hashlib.blake2b(content, digest_size=DIGEST).digest() for content in contents)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def find_duplicates(digests: list[Path], places: list[Path]) -> None:
    """Write into each of `places` the numbers of those documents, whose hashes a file of `digests` holds, that also
    stand before: in it or in a file that comes first.

    Of the hashes, those are held at a time that begin alike: as many, however many there are."""
    total = sum(path.stat().st_size // DIGEST for path in digests)
    buckets = -(-total // BUCKET) or 1
    for path in places:
        path.write_bytes(b"")
    for bucket in range(buckets):
        hashes, owners, numbers = [], [], []
        for which, path in enumerate(digests):
            pairs = np.fromfile(path, "<u8").reshape(-1, 2)
            (inside,) = np.nonzero(pairs[:, 0] % np.uint64(buckets) == bucket)
            hashes.append(pairs[inside])
            owners.append(np.full(len(inside), which))
            numbers.append(inside)
        high, low = np.concatenate(hashes).T
        owner, number = np.concatenate(owners), np.concatenate(numbers)
        order = np.lexsort((low, high))  # stable: the first of equal ones is the first in the text
        high, low, owner, number = high[order], low[order], owner[order], number[order]
        again = np.nonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))[0] + 1
        for which in np.unique(owner[again]):
            with places[which].open("ab") as file:  # one at a time: there are more than a process may have open
                file.write(number[again][owner[again] == which].astype("<i8").tobytes())


def identity_of(held_out: HeldOut | None, deduplicate: bool) -> list[Any]:
    """What joins a store's fingerprint."""
    return [held_out and [held_out.seed, held_out.share, held_out.chosen], deduplicate]
