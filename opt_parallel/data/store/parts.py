"""Writes a part of a token store under a temporary name, and renames the part when it is complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from opt_parallel.data.encode.columns import Column, Encoded
from opt_parallel.data.store.blocks import checksums_of
from opt_parallel.data.store.elsewhere import COLUMNS, Elsewhere
from opt_parallel.data.store.store import META, Damaged, Part, PartWriter, read_part
from opt_parallel.data.text.records import LEFT_OUT, BadRecords
from opt_parallel.runtime.errors import one_line
from opt_parallel.storage.atomic import beside, publish, remove
from opt_parallel.storage.checked import dump_checked

TOKEN_COUNTS = "words.npy"  # The file with the number of occurrences of each token id in a part.


@dataclass(frozen=True)
class PartMeta:
    """A summary of a part of a token store. `lengths` maps a length in tokens to the number of such documents."""

    part: Part
    counts: dict[str, int]
    lengths: dict[int, int]
    text_bytes: int
    position: list[int]  # The position after this part in a stream: the number of a file, and of a record in the file.
    bad: list[str] = field(default_factory=list)  # Messages of the first bad records that were left out.


def read_meta(part: Path) -> PartMeta:
    """The summary of the part in the folder `part`. Raises: Damaged."""
    content, checksum = read_part(part.parent, part.name)
    try:
        lengths = {int(length): count for length, count in content["lengths"].items()}
        own = replace(Part.of_json(content["part"]), checksum=checksum if "blocks" in content else None)
        text_bytes, position, bad = content["text_bytes"], content["position"], content.get("bad", [])
        return PartMeta(own, content["counts"], lengths, text_bytes, position, bad)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(part.parent, f"{part.name}/{META} has the wrong content ({one_line(error)})") from error


class PartMaker:
    """Writes a part of a token store under a temporary name. `finish` renames the part."""

    def __init__(
        self, folder: Path, name: str, columns: Mapping[str, Column], elsewhere: Elsewhere | None = None
    ) -> None:
        """`columns` are those of the encoder. With `elsewhere`, the part has no ids, but describes where they are."""
        self.target = folder / name
        self.temporary = beside(self.target)
        self.elsewhere = elsewhere
        self.writer = PartWriter(self.temporary, COLUMNS if elsewhere else columns)
        self.lengths: Counter[int] = Counter()
        self.token_counts = np.zeros(0, np.int64)
        self.text_bytes = 0

    def write(self, encoded: Encoded) -> None:
        self.writer.write(encoded)
        lengths, counts = np.unique(encoded.columns["lengths"], return_counts=True)
        self.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        if self.elsewhere is None:
            self.count(encoded.columns["ids"])
        self.text_bytes += encoded.text_bytes

    def count(self, ids: np.ndarray) -> None:
        """Count the occurrences of each token id, for the statistics."""
        self.token_counts = add_counts(self.token_counts, np.bincount(ids.astype(np.int64)))

    def count_more(self, token: int, times: int) -> None:
        """Add `times` to the number of occurrences of a token id."""
        more = np.zeros(token + 1, np.int64)
        more[token] = times
        self.token_counts = add_counts(self.token_counts, more)

    def finish(
        self, position: tuple[int, int] = (0, 0), counts: Counter[str] | None = None, bad: BadRecords | None = None
    ) -> PartMeta:
        """Complete and rename the part. `counts` and `bad` count the documents that were left out before encoding."""
        bad = bad or BadRecords()
        part = replace(self.writer.close(), name=self.target.name, elsewhere=self.elsewhere)
        left_out = self.writer.counts + (counts or Counter()) + Counter({LEFT_OUT: bad.count})
        meta = PartMeta(part, dict(left_out), dict(self.lengths), self.text_bytes, [*position], bad.first)
        np.save(self.temporary / TOKEN_COUNTS, self.token_counts.astype(np.uint32))
        write_meta(self.temporary, self.writer.columns, meta)
        try:
            publish(self.temporary, self.target)
        except OSError:
            if not (self.target / META).exists():
                raise
            remove(self.temporary)  # a host that seemed dead has completed the same part
        return read_meta(self.target)


def write_meta(part: Path, columns: Iterable[str], meta: PartMeta) -> None:
    """Write the part's summary to part.json, with checksums of the part's other files, which must exist."""
    blocks = {name: checksums_of(part / f"{name}.bin") for name in columns}
    content = {**asdict(meta), "part": meta.part.as_json(), "blocks": blocks}
    content[TOKEN_COUNTS] = checksums_of(part / TOKEN_COUNTS)
    content["part"].pop("checksum", None)
    (part / META).write_text(dump_checked(content), encoding="utf-8")


def add_counts(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two arrays of counts, in int64. The shorter array is padded with zeros."""
    if len(one) < len(other):
        one, other = other, one
    total = one.astype(np.int64)
    total[: len(other)] += other
    return total
