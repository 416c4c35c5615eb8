"""A store filled: every unit of the text a part, by several processes; what is whole stays, whatever happens.

A part is written under a temporary name and renamed when it is whole, so a preparation that is started again makes just
the parts that are missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opt_parallel.data.encoding import Encoder, Record, Text, batches_of
from opt_parallel.data.selection import (
    DUPLICATES,
    HELD_OUT,
    HeldOut,
    content_of,
    digests_of,
    find_duplicates,
    identity_of,
)
from opt_parallel.data.sources import Corpus, Unit
from opt_parallel.data.store import Encoded, Part, PartWriter
from opt_parallel.data.workers import Report, progress, run_jobs
from opt_parallel.errors import UserError
from opt_parallel.machine import cpus
from opt_parallel.shapes import require
from opt_parallel.storage.atomic import PARTIAL, beside, publish, remove

META = "part.json"
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
        return [self.encoder.identity(), identity_of(self.held_out, self.deduplicate)]


@dataclass(frozen=True)
class PartMeta:
    """What is known of a part: `lengths` how many documents are how long."""

    part: Part
    counts: dict[str, int]
    lengths: dict[int, int]
    text_bytes: int
    position: list[int]  # of a stream: the unit, and records of it, that come next


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
            run_jobs([partial(job, folder, place) for place in missing], materials, hands, report)

    if any(material.deduplicate for material in materials):
        digests = [folder / f"digests-{place.number:05d}" for place in places]
        run("comparing", _hash, [place for place, path in zip(places, digests, strict=True) if not path.exists()])
        find_duplicates(digests, [_duplicates(folder, place) for place in places])
    run("encoding", _encode, [each for each in places if not (folder / part_name(each.number) / META).exists()])
    for path in (*folder.glob("digests-*"), *folder.glob("duplicates-*")):
        remove(path)
    for material, was in zip(materials, before, strict=True):
        require(
            material.corpus.identity() == was,
            f"{material.corpus.key}: {material.corpus.names} changed while it was read: start again when it is whole",
        )
    return [read_meta(folder / part_name(place.number)) for place in places]


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def read_meta(part: Path) -> PartMeta:
    """What is known of the part in a folder."""
    content = json.loads((part / META).read_text(encoding="utf-8"))
    lengths = {int(length): count for length, count in content["lengths"].items()}
    return PartMeta(Part(**content["part"]), content["counts"], lengths, content["text_bytes"], content["position"])


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

    def finish(self, position: tuple[int, int] = (0, 0), counts: Counter[str] | None = None) -> PartMeta:
        """Make it whole; `counts`: what else was left out."""
        part = replace(self.writer.close(), name=self.target.name)
        meta = PartMeta(
            part, dict(self.writer.counts + (counts or Counter())), dict(self.lengths), self.text_bytes, [*position]
        )
        np.save(self.temporary / WORDS, self.words.astype(np.uint32))
        (self.temporary / META).write_text(json.dumps(asdict(meta)), encoding="utf-8")
        publish(self.temporary, self.target)
        return meta


def add_counts(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two arrays of counts, in int64, the shorter one continued with zeros."""
    if len(one) < len(other):
        one, other = other, one
    total = one.astype(np.int64)
    total[: len(other)] += other
    return total


def _duplicates(folder: Path, place: Place) -> Path:
    return folder / f"duplicates-{place.number:05d}"


def _hash(folder: Path, place: Place, materials: list[Material], report: Report) -> None:
    """Write the hashes of a unit's documents."""
    material, target = materials[place.owner], folder / f"digests-{place.number:05d}"
    temporary = beside(target)

    def write(count_lines: bool) -> None:
        with temporary.open("wb") as file:
            for records in batches_of(material.corpus.read(place.unit, count_lines)):
                file.write(digests_of(content_of(record, material.same) for record in records).tobytes())

    _with_lines(write, place.unit)
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
        for records in batches_of(material.corpus.read(place.unit, count_lines)):
            kept = _selected(records, material, duplicates, number, counts)
            number += len(records)
            encoded = material.encoder.encode(kept)
            maker.write(encoded)
            report(encoded.text_bytes)
        maker.finish(counts=counts)
        report(place.unit.size - maker.text_bytes)

    _with_lines(write, place.unit)


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


def _with_lines(work: Callable[[bool], None], unit: Unit) -> None:
    """Do `work(False)`; a mistake in the middle of a file is found once more with the number of its line."""
    try:
        work(False)
    except UserError:
        if any(piece.start for piece in unit.pieces):
            work(True)
        raise
