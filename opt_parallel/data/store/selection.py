"""Selects the documents of a token store: removes duplicates, and holds out documents for validation.

Whether a document is held out depends only on a hash of its text. So the order of files and the number of processes do
not matter, and all copies of a text are in the same split.
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

DIGEST = 16  # Bytes of a hash. Among 10⁹ different texts, two texts have the same hash with probability 10⁻²⁰.
BUCKET = 1 << 22  # Approximate number of hashes that are compared at a time.
DUPLICATES, HELD_OUT = "duplicates left out", "documents held out for validation"


@dataclass(frozen=True)
class HeldOut:
    """Holds out a `share` of the documents for validation, by a hash of their text that depends on `seed`.

    If `chosen` is true, the held-out documents are selected, else the other documents."""

    seed: int
    share: float
    chosen: bool

    def takes(self, content: bytes) -> bool:
        """Whether a document with this content is selected."""
        digest = hashlib.blake2b(content, digest_size=8, key=str(self.seed).encode()).digest()
        return (int.from_bytes(digest, "little") < int(self.share * 2**64)) == self.chosen


def content_of(record: Record, text: Text | None) -> bytes:
    """The bytes of a document that are compared with other documents.

    The bytes are the text without surrounding white space, or all fields of the record if `text` is None."""
    if text is not None:
        return text.of(record).strip().encode()
    return json.dumps(dict(record.fields), sort_keys=True, default=str).encode()


def digests_of(contents: Iterable[bytes]) -> np.ndarray:
    """The hash of each document, as an array (documents, 2) uint64."""
    digests = b"".join(hashlib.blake2b(content, digest_size=DIGEST).digest() for content in contents)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def find_duplicates(digests: list[Path], targets: list[Path]) -> None:
    """Write the indices of duplicate documents into the files `targets`.

    Each file of `digests` has the hashes of a part of the documents, and a file of `targets` gets the duplicates of
    this part. A document is a duplicate if its hash occurs earlier in the same file, or in a previous file. Hashes are
    processed in buckets (by remainder), so memory does not grow with their number."""
    total = sum(path.stat().st_size // DIGEST for path in digests)
    buckets = -(-total // BUCKET) or 1
    for path in targets:
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
        order = np.lexsort((low, high))  # a stable sort, so equal hashes stay in the order of the text
        high, low, owner, number = high[order], low[order], owner[order], number[order]
        again = np.nonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))[0] + 1
        for which in np.unique(owner[again]):
            with targets[which].open("ab") as file:  # one file at a time, because the number of open files is limited
                file.write(number[again][owner[again] == which].astype("<i8").tobytes())


def identity_of(held_out: HeldOut | None, deduplicate: bool) -> list[Any]:
    """The part of a token store's fingerprint that describes the selection of documents."""
    return [held_out and [held_out.seed, held_out.share, held_out.chosen], deduplicate]
