"""A store filled: every unit of the text a part, by several processes; what is whole stays, whatever happens.

A part is written under a temporary name and renamed when it is whole, so a preparation that is started again makes just
the parts that are missing.
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

WORDS = "words.npy"  # how often each id stands in a part
WORTH_A_PROCESS = 1 << 22  # bytes of text: to start one takes as long as to encode these


@dataclass(frozen=True)
class Material:
    """A corpus and what becomes of it. `same`: the text by which documents are the same; None: all their fields."""

    corpus: Corpus
    encoder: Encoder
    same: Text | None = None
    held_out: HeldOut | None = None
    deduplicate: bool = False

    def made_from(self) -> list[Any]:
        """What changes when the parts do, wherever the text lies."""
        return [self.corpus.made_from(), *self._made_by()]

    def identity(self) -> list[Any]:
        """What changes when a file of the text does, or the parts: earlier versions named stores by it."""
        return [self.corpus.identity(), *self._made_by()]

    def _made_by(self) -> list[Any]:
        selection = identity_of(self.held_out, self.deduplicate)
        return [self.encoder.identity(), selection, *([LEFT_OUT] if self.skip_bad else [])]

    @property
    def skip_bad(self) -> bool:
        return self.corpus.skip_bad

    def good(self, items: list[Item], bad: BadRecords) -> list[Record]:
        """Those of `items` that the encoder takes. Where bad ones are left out they are added to `bad`; else the first
        is raised, here or by the encoder."""
        return list(sift(items, self.encoder.check, bad if self.skip_bad else None))


@dataclass(frozen=True)
class PartMeta:
    """What is known of a part: `lengths` how many documents are how long."""

    part: Part
    counts: dict[str, int]
    lengths: dict[int, int]
    text_bytes: int
    position: list[int]  # of a stream: the unit, and records of it, that come next
    bad: list[str] = field(default_factory=list)  # the first records that were left out as bad


@dataclass(frozen=True)
class Place:
    """Where a part comes from: its number, and a unit of the material number `owner`."""

    number: int
    owner: int
    unit: Unit


def fill(folder: Path, materials: list[Material], workers: int) -> list[PartMeta]:
    """The parts of all materials in `folder`, made where they are missing; `workers` 0: as many as there are CPUs.

    Raises: UserError, also if the text changed meanwhile; Unfinished."""
    before = [material.corpus.identity() for material in materials]
    for leftover in folder.glob(f"*{PARTIAL}"):
        remove(leftover)
    every = [(owner, unit) for owner, each in enumerate(materials) for unit in each.corpus.units()]
    places = [Place(number, owner, unit) for number, (owner, unit) in enumerate(every)]

    def run(what: str, job: Callable[..., None], missing: list[Place]) -> None:
        total = sum(place.unit.size for place in missing)
        hands = min(workers or cpus(), len(missing), total // WORTH_A_PROCESS) or 1
        with progress(f"{materials[0].corpus.key}: {what}", total) as report:
            run_jobs([(place.unit.name, partial(job, folder, place)) for place in missing], materials, hands, report)

    try:
        if any(material.deduplicate for material in materials):
            digests = [folder / f"digests-{place.number:05d}" for place in places]
            run("comparing", _hash, [place for place, path in zip(places, digests, strict=True) if not path.exists()])
            find_duplicates(digests, [_duplicates(folder, place) for place in places])
        run("encoding", _encode, [each for each in places if not _is_whole(folder / part_name(each.number))])
    except BadRecord as error:
        run("counting bad records", _count, places)
        raise _refusal(folder, materials, places) or error from None
    for path in [path for kind in ("digests", "duplicates", "bad") for path in folder.glob(f"{kind}-*")]:
        remove(path)
    for material, was in zip(materials, before, strict=True):
        require(
            material.corpus.identity() == was,
            f"{material.corpus.key}: {material.corpus.names} changed while it was read: start again when it is whole",
        )
    return _with_lines([read_meta(folder / part_name(place.number)) for place in places], materials, places)


def read_meta(part: Path) -> PartMeta:
    """What is known of the part in a folder."""
    content, checksum = read_part(part.parent, part.name)
    try:
        lengths = {int(length): count for length, count in content["lengths"].items()}
        own = replace(Part(**content["part"]), checksum=checksum if "blocks" in content else None)
        text_bytes, position, bad = content["text_bytes"], content["position"], content.get("bad", [])
        return PartMeta(own, content["counts"], lengths, text_bytes, position, bad)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(part.parent, f"{part.name}/{META} is not what was written ({one_line(error)})") from error


class PartMaker:
    """Writes a part, under a temporary name until `finish`."""

    def __init__(self, folder: Path, name: str, encoder: Encoder) -> None:
        self.target = folder / name
        self.temporary = beside(self.target)
        self.writer = PartWriter(self.temporary, encoder.columns)
        self.lengths: Counter[int] = Counter()
        self.words = np.zeros(0, np.int64)
        self.text_bytes = 0

    def write(self, encoded: Encoded) -> None:
        self.writer.write(encoded)
        lengths, counts = np.unique(encoded.columns["lengths"], return_counts=True)
        self.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        self.words = add_counts(self.words, np.bincount(encoded.columns["ids"].astype(np.int64)))
        self.text_bytes += encoded.text_bytes

    def finish(
        self, position: tuple[int, int] = (0, 0), counts: Counter[str] | None = None, bad: BadRecords | None = None
    ) -> PartMeta:
        """Make it whole; `counts` and `bad`: what else was left out."""
        bad = bad or BadRecords()
        part = replace(self.writer.close(), name=self.target.name)
        left_out = self.writer.counts + (counts or Counter()) + Counter({LEFT_OUT: bad.count})
        meta = PartMeta(part, dict(left_out), dict(self.lengths), self.text_bytes, [*position], bad.first)
        np.save(self.temporary / WORDS, self.words.astype(np.uint32))
        write_meta(self.temporary, self.writer.columns, meta)
        publish(self.temporary, self.target)
        return read_meta(self.target)


def write_meta(part: Path, columns: Iterable[str], meta: PartMeta) -> None:
    """part.json of a part that has its other files: what is known of it, and their checksums."""
    blocks = {name: checksums_of(part / f"{name}.bin") for name in columns}
    content = {**asdict(meta), "blocks": blocks, WORDS: checksums_of(part / WORDS)}
    del content["part"]["checksum"]
    (part / META).write_text(dump_checked(content), encoding="utf-8")


def add_counts(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two arrays of counts, in int64, the shorter one continued with zeros."""
    if len(one) < len(other):
        one, other = other, one
    total = one.astype(np.int64)
    total[: len(other)] += other
    return total


def _is_whole(part: Path) -> bool:
    """Whether a part need not be made; what is left of a damaged one is deleted."""
    try:
        if (part / META).exists():
            read_meta(part)
            return True
    except UserError:
        remove(part)
    return False


def _duplicates(folder: Path, place: Place) -> Path:
    return folder / f"duplicates-{place.number:05d}"


def _hash(folder: Path, place: Place, materials: list[Material], report: Report) -> None:
    """Write the hashes of a unit's documents."""
    material, target = materials[place.owner], folder / f"digests-{place.number:05d}"
    temporary = beside(target)

    def write(count_lines: bool) -> None:
        with temporary.open("wb") as file:
            for items in batches_of(material.corpus.read(place.unit, count_lines)):
                records = material.good(items, BadRecords())
                file.write(digests_of(content_of(record, material.same) for record in records).tobytes())

    _naming_lines(write, place.unit)
    publish(temporary, target)
    report(place.unit.size)


def _encode(folder: Path, place: Place, materials: list[Material], report: Report) -> None:
    """Make the part of a unit."""
    material = materials[place.owner]
    duplicates: set[int] = set()
    if material.deduplicate:
        duplicates = set(np.fromfile(_duplicates(folder, place), "<i8").tolist())

    def write(count_lines: bool) -> None:
        maker, counts, number = PartMaker(folder, part_name(place.number), material.encoder), Counter[str](), 0
        bad = BadRecords()
        for items in batches_of(material.corpus.read(place.unit, count_lines)):
            records = material.good(items, bad)
            kept = _selected(records, material, duplicates, number, counts)
            number += len(records)
            encoded = material.encoder.encode(kept)
            maker.write(encoded)
            report(encoded.text_bytes)
        # what is held out was read before, with what it is held out of, and its bad records were told
        maker.finish(counts=counts, bad=None if material.held_out and material.held_out.chosen else bad)
        report(place.unit.size - maker.text_bytes)

    _naming_lines(write, place.unit)


def _count(folder: Path, place: Place, materials: list[Material], report: Report) -> None:
    """Write how many bad records a unit has."""
    bad = _bad_of(materials[place.owner], place.unit)
    _counted(folder, place).write_text(json.dumps(asdict(bad)), encoding="utf-8")
    report(place.unit.size)


def _counted(folder: Path, place: Place) -> Path:
    return folder / f"bad-{place.number:05d}.json"


def _bad_of(material: Material, unit: Unit, count_lines: bool = False) -> BadRecords:
    bad = BadRecords()
    bad.seek(material.corpus.read(unit, count_lines), material.encoder.check)
    return bad


def _refusal(folder: Path, materials: list[Material], places: list[Place]) -> UserError | None:
    """The error that tells the first bad record, and how many there are in all; None if the text has changed so that
    there is none any more."""
    each = [BadRecords(**json.loads(_counted(folder, place).read_text(encoding="utf-8"))) for place in places]
    first = next((place for place, bad in zip(places, each, strict=True) if bad.count), None)
    listed = _bad_of(materials[first.owner], first.unit, count_lines=True).first if first else []
    every = BadRecords(sum(bad.seen for bad in each), sum(bad.count for bad in each), listed)
    return every.refusal() if listed else None


def _with_lines(metas: list[PartMeta], materials: list[Material], places: list[Place]) -> list[PartMeta]:
    """The same, the first bad records of all with the right numbers of their lines, which finding costs reading."""
    told = 0
    for number, (meta, place) in enumerate(zip(metas, places, strict=True)):
        if told < LISTED and meta.bad and _is_cut(place.unit):
            metas[number] = replace(meta, bad=_bad_of(materials[place.owner], place.unit, count_lines=True).first)
        told += len(meta.bad)
    return metas


def _selected(
    records: list[Record], material: Material, duplicates: set[int], first: int, counts: Counter[str]
) -> list[Record]:
    """Those of `records`, the first of which is number `first` of its unit, that the store has; counts the others."""
    if material.held_out is not None:
        taken = [material.held_out.takes(content_of(record, material.same)) for record in records]
    else:
        taken = [True] * len(records)
    kept = [number for number, takes in enumerate(taken) if takes and first + number not in duplicates]
    if not all(taken) and material.held_out and not material.held_out.chosen:
        counts[HELD_OUT] += len(records) - sum(taken)
    if len(kept) < sum(taken):
        counts[DUPLICATES] += sum(taken) - len(kept)
    return [records[number] for number in kept]


def _naming_lines(work: Callable[[bool], None], unit: Unit) -> None:
    """Do `work(False)`; a mistake in the middle of a file is found once more with the number of its line."""
    try:
        work(False)
    except BadRecord:
        raise  # all will be counted, and the first be named
    except UserError:
        if _is_cut(unit):
            work(True)
        raise


def _is_cut(unit: Unit) -> bool:
    """Whether a piece of it begins in the middle of a file."""
    return any(piece.start for piece in unit.pieces)
