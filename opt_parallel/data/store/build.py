"""Builds a token store with several processes. Each part of the store holds the tokens of one piece of the text.

A part is written under a temporary name and renamed when it is complete. After an interruption, the next start builds
only the missing parts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opt_parallel.config.model import require
from opt_parallel.data.encode.columns import Encoded
from opt_parallel.data.encode.pretrain import Encoder, batches_of
from opt_parallel.data.store.blocks import checksums_of
from opt_parallel.data.store.selection import (
    DUPLICATES,
    HELD_OUT,
    HeldOut,
    content_of,
    digests_of,
    find_duplicates,
    identity_of,
)
from opt_parallel.data.store.store import META, Damaged, Part, PartWriter, part_name, read_part
from opt_parallel.data.store.workers import Report, progress, run_jobs
from opt_parallel.data.text.records import LEFT_OUT, LISTED, BadRecord, BadRecords, Item, Record, Text, sift
from opt_parallel.data.text.sources import Corpus, Unit
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.machine import cpus
from opt_parallel.storage.atomic import PARTIAL, beside, publish, remove
from opt_parallel.storage.checked import dump_checked

TOKEN_COUNTS = "words.npy"  # The file with the number of occurrences of each token id in a part.
WORTH_A_PROCESS = 1 << 22  # Encoding this many bytes of text takes as long as the start of a process.


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

    @property
    def skip_bad(self) -> bool:
        return self.corpus.skip_bad

    def good(self, items: list[Item], bad: BadRecords) -> list[Record]:
        """The records that the encoder accepts.

        With `skip_bad`, the other records are added to `bad`. Without `skip_bad`, this method or the encoder raises an
        error for the first bad record."""
        return list(sift(items, self.encoder.check, bad if self.skip_bad else None))


@dataclass(frozen=True)
class PartMeta:
    """A summary of a part of a token store. `lengths` maps a length in tokens to the number of such documents."""

    part: Part
    counts: dict[str, int]
    lengths: dict[int, int]
    text_bytes: int
    position: list[int]  # The position after this part in a stream: the number of a file, and of a record in the file.
    bad: list[str] = field(default_factory=list)  # Messages of the first bad records that were left out.


@dataclass(frozen=True)
class PartPlan:
    """A part to build from a piece (`unit`) of the text. `owner` is the index of the part's recipe."""

    number: int
    owner: int
    unit: Unit


def fill(folder: Path, recipes: list[Recipe], workers: int) -> list[PartMeta]:
    """Build the missing parts of the token store in `folder`, and return the summaries of all parts.

    `workers` is the number of processes, and 0 means one process per CPU.

    Raises: UserError, also if the text changes during the build, and Unfinished if the build was interrupted."""
    before = [recipe.corpus.identity() for recipe in recipes]
    for leftover in folder.glob(f"*{PARTIAL}"):
        remove(leftover)
    every = [(owner, unit) for owner, each in enumerate(recipes) for unit in each.corpus.units()]
    plans = [PartPlan(number, owner, unit) for number, (owner, unit) in enumerate(every)]

    def run(what: str, job: Callable[..., None], missing: list[PartPlan]) -> None:
        total = sum(plan.unit.size for plan in missing)
        processes = min(workers or cpus(), len(missing), total // WORTH_A_PROCESS) or 1
        with progress(f"{recipes[0].corpus.key}: {what}", total) as report:
            run_jobs([(plan.unit.name, partial(job, folder, plan)) for plan in missing], recipes, processes, report)

    try:
        if any(recipe.deduplicate for recipe in recipes):
            digests = [folder / f"digests-{plan.number:05d}" for plan in plans]
            run("comparing", _hash, [plan for plan, path in zip(plans, digests, strict=True) if not path.exists()])
            find_duplicates(digests, [_duplicates(folder, plan) for plan in plans])
        run("encoding", _encode, [each for each in plans if not _is_complete(folder / part_name(each.number))])
    except BadRecord as error:
        run("counting bad records", _count, plans)
        raise _refusal(folder, recipes, plans) or error from None
    for path in [path for kind in ("digests", "duplicates", "bad") for path in folder.glob(f"{kind}-*")]:
        remove(path)
    for recipe, was in zip(recipes, before, strict=True):
        require(
            recipe.corpus.identity() == was,
            f"{recipe.corpus.key}: {recipe.corpus.names} changed while it was read: wait until it is complete, then "
            "start again",
        )
    return _with_lines([read_meta(folder / part_name(plan.number)) for plan in plans], recipes, plans)


def read_meta(part: Path) -> PartMeta:
    """The summary of the part in the folder `part`. Raises: Damaged."""
    content, checksum = read_part(part.parent, part.name)
    try:
        lengths = {int(length): count for length, count in content["lengths"].items()}
        own = replace(Part(**content["part"]), checksum=checksum if "blocks" in content else None)
        text_bytes, position, bad = content["text_bytes"], content["position"], content.get("bad", [])
        return PartMeta(own, content["counts"], lengths, text_bytes, position, bad)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(part.parent, f"{part.name}/{META} has the wrong content ({one_line(error)})") from error


class PartMaker:
    """Writes a part of a token store under a temporary name. `finish` renames the part."""

    def __init__(self, folder: Path, name: str, encoder: Encoder) -> None:
        self.target = folder / name
        self.temporary = beside(self.target)
        self.writer = PartWriter(self.temporary, encoder.columns)
        self.lengths: Counter[int] = Counter()
        self.token_counts = np.zeros(0, np.int64)
        self.text_bytes = 0

    def write(self, encoded: Encoded) -> None:
        self.writer.write(encoded)
        lengths, counts = np.unique(encoded.columns["lengths"], return_counts=True)
        self.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        self.token_counts = add_counts(self.token_counts, np.bincount(encoded.columns["ids"].astype(np.int64)))
        self.text_bytes += encoded.text_bytes

    def finish(
        self, position: tuple[int, int] = (0, 0), counts: Counter[str] | None = None, bad: BadRecords | None = None
    ) -> PartMeta:
        """Complete and rename the part. `counts` and `bad` count the documents that were left out before encoding."""
        bad = bad or BadRecords()
        part = replace(self.writer.close(), name=self.target.name)
        left_out = self.writer.counts + (counts or Counter()) + Counter({LEFT_OUT: bad.count})
        meta = PartMeta(part, dict(left_out), dict(self.lengths), self.text_bytes, [*position], bad.first)
        np.save(self.temporary / TOKEN_COUNTS, self.token_counts.astype(np.uint32))
        write_meta(self.temporary, self.writer.columns, meta)
        publish(self.temporary, self.target)
        return read_meta(self.target)


def write_meta(part: Path, columns: Iterable[str], meta: PartMeta) -> None:
    """Write the part's summary to part.json, with checksums of the part's other files, which must exist."""
    blocks = {name: checksums_of(part / f"{name}.bin") for name in columns}
    content = {**asdict(meta), "blocks": blocks, TOKEN_COUNTS: checksums_of(part / TOKEN_COUNTS)}
    del content["part"]["checksum"]
    (part / META).write_text(dump_checked(content), encoding="utf-8")


def add_counts(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two arrays of counts, in int64. The shorter array is padded with zeros."""
    if len(one) < len(other):
        one, other = other, one
    total = one.astype(np.int64)
    total[: len(other)] += other
    return total


def _is_complete(part: Path) -> bool:
    """Whether the part in the folder `part` is complete. The function deletes a damaged part."""
    try:
        if (part / META).exists():
            read_meta(part)
            return True
    except UserError:
        remove(part)
    return False


def _duplicates(folder: Path, plan: PartPlan) -> Path:
    return folder / f"duplicates-{plan.number:05d}"


def _hash(folder: Path, plan: PartPlan, recipes: list[Recipe], report: Report) -> None:
    """Write the hashes of the documents in one piece of the text."""
    recipe, target = recipes[plan.owner], folder / f"digests-{plan.number:05d}"
    temporary = beside(target)

    def write(count_lines: bool) -> None:
        with temporary.open("wb") as file:
            for items in batches_of(recipe.corpus.read(plan.unit, count_lines)):
                records = recipe.good(items, BadRecords())
                file.write(digests_of(content_of(record, recipe.same) for record in records).tobytes())

    _naming_lines(write, plan.unit)
    publish(temporary, target)
    report(plan.unit.size)


def _encode(folder: Path, plan: PartPlan, recipes: list[Recipe], report: Report) -> None:
    """Encode one piece of the text into a part of the token store."""
    recipe = recipes[plan.owner]
    duplicates: set[int] = set()
    if recipe.deduplicate:
        duplicates = set(np.fromfile(_duplicates(folder, plan), "<i8").tolist())

    def write(count_lines: bool) -> None:
        maker, counts, number = PartMaker(folder, part_name(plan.number), recipe.encoder), Counter[str](), 0
        bad = BadRecords()
        for items in batches_of(recipe.corpus.read(plan.unit, count_lines)):
            records = recipe.good(items, bad)
            kept = _selected(records, recipe, duplicates, number, counts)
            number += len(records)
            encoded = recipe.encoder.encode(kept)
            maker.write(encoded)
            report(encoded.text_bytes)
        # Bad records of held-out text were reported before, because the training store was built from the same files.
        maker.finish(counts=counts, bad=None if recipe.held_out and recipe.held_out.chosen else bad)
        report(plan.unit.size - maker.text_bytes)

    _naming_lines(write, plan.unit)


def _count(folder: Path, plan: PartPlan, recipes: list[Recipe], report: Report) -> None:
    """Write the number of bad records in one piece of the text."""
    bad = _bad_of(recipes[plan.owner], plan.unit)
    _bad_file(folder, plan).write_text(json.dumps(asdict(bad)), encoding="utf-8")
    report(plan.unit.size)


def _bad_file(folder: Path, plan: PartPlan) -> Path:
    return folder / f"bad-{plan.number:05d}.json"


def _bad_of(recipe: Recipe, unit: Unit, count_lines: bool = False) -> BadRecords:
    bad = BadRecords()
    bad.seek(recipe.corpus.read(unit, count_lines), recipe.encoder.check)
    return bad


def _refusal(folder: Path, recipes: list[Recipe], plans: list[PartPlan]) -> UserError | None:
    """An error with the first bad record and the number of all bad records.

    The result is None if the text has changed and contains no bad record any more."""
    each = [BadRecords(**json.loads(_bad_file(folder, plan).read_text(encoding="utf-8"))) for plan in plans]
    first = next((plan for plan, bad in zip(plans, each, strict=True) if bad.count), None)
    listed = _bad_of(recipes[first.owner], first.unit, count_lines=True).first if first else []
    every = BadRecords(sum(bad.seen for bad in each), sum(bad.count for bad in each), listed)
    return every.refusal() if listed else None


def _with_lines(metas: list[PartMeta], recipes: list[Recipe], plans: list[PartPlan]) -> list[PartMeta]:
    """The summaries `metas`, with line numbers in the messages about the first bad records.

    A piece of text that starts inside a file is read again to find the line numbers."""
    listed = 0
    for number, (meta, plan) in enumerate(zip(metas, plans, strict=True)):
        if listed < LISTED and meta.bad and _is_cut(plan.unit):
            metas[number] = replace(meta, bad=_bad_of(recipes[plan.owner], plan.unit, count_lines=True).first)
        listed += len(meta.bad)
    return metas


def _selected(
    records: list[Record], recipe: Recipe, duplicates: set[int], first: int, counts: Counter[str]
) -> list[Record]:
    """The records that belong into the token store. The numbers of other records are added to `counts`.

    `first` is the index of the first of the `records` in its piece of the text."""
    if recipe.held_out is not None:
        taken = [recipe.held_out.takes(content_of(record, recipe.same)) for record in records]
    else:
        taken = [True] * len(records)
    kept = [number for number, takes in enumerate(taken) if takes and first + number not in duplicates]
    if not all(taken) and recipe.held_out and not recipe.held_out.chosen:
        counts[HELD_OUT] += len(records) - sum(taken)
    if len(kept) < sum(taken):
        counts[DUPLICATES] += sum(taken) - len(kept)
    return [records[number] for number in kept]


def _naming_lines(work: Callable[[bool], None], unit: Unit) -> None:
    """Call `work(False)`, and after an error call `work(True)`, whose error message has the line number.

    The second call is made only if the piece of text starts inside a file."""
    try:
        work(False)
    except BadRecord:
        raise  # `fill` counts all bad records, and its error message names the first bad record
    except UserError:
        if _is_cut(unit):
            work(True)
        raise


def _is_cut(unit: Unit) -> bool:
    """Whether the unit contains a piece that starts inside a file."""
    return any(piece.start for piece in unit.pieces)
