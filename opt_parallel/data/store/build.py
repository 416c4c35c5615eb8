"""Builds a token store with several processes. Each part of the store holds the tokens of one piece of the text.

A part is written under a temporary name and renamed when it is complete. After an interruption, the next start builds
only the missing parts. Several hosts that share the folder each build the parts that they claim.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from opt_parallel.config.model import require
from opt_parallel.data.encode.pretrain import batches_of
from opt_parallel.data.store.locate import locate
from opt_parallel.data.store.parts import PartMaker, PartMeta, read_meta
from opt_parallel.data.store.recipe import Recipe, chosen
from opt_parallel.data.store.selection import digests_of, find_duplicates
from opt_parallel.data.store.store import META, part_name
from opt_parallel.data.store.workers import Report, progress, run_jobs
from opt_parallel.data.text.records import LISTED, BadRecord, BadRecords
from opt_parallel.data.text.sources import Unit
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.machine import cpus
from opt_parallel.storage.atomic import PARTIAL, beside, publish, remove, write_text
from opt_parallel.storage.claims import Claims

IDS_FASTER = 4096  # A file of ids is located in place at so many times the rate of encoding text.
WORTH_A_PROCESS = 1 << 22  # Encoding this many bytes of text takes as long as the start of a process.


@dataclass(frozen=True)
class PartPlan:
    """A part to build from a piece (`unit`) of the text. `owner` is the index of the part's recipe."""

    number: int
    owner: int
    unit: Unit


def fill(folder: Path, recipes: list[Recipe], workers: int, claims: Claims | None = None) -> list[PartMeta]:
    """Build the missing parts of the token store in `folder`, and return the summaries of all parts.

    `workers` is the number of processes, and 0 means one process per CPU. With `claims`, other hosts build parts too,
    and the function returns in the process that is to complete the token store.

    Raises: UserError, also if the text changes during the build, and Unfinished if the build was interrupted."""
    before = [recipe.corpus.identity() for recipe in recipes]
    every = [(owner, unit) for owner, each in enumerate(recipes) for unit in each.corpus.units()]
    plans = [PartPlan(number, owner, unit) for number, (owner, unit) in enumerate(every)]
    work = partial(_work, folder, recipes, plans, workers, claims)
    try:
        if any(recipe.deduplicate for recipe in recipes):
            _compare(folder, plans, work, claims)
        work("encoding", _encode, lambda plan: _is_complete(folder / part_name(plan.number)))
    except BadRecord as error:
        work("counting bad records", _count, lambda plan: _bad_file(folder, plan).exists())
        raise _refusal(folder, recipes, plans) or error from None
    if claims:
        claims.only("store")
    for path in [path for kind in ("digests-*", "duplicates*", "bad-*", f"*{PARTIAL}") for path in folder.glob(kind)]:
        remove(path)
    for recipe, was in zip(recipes, before, strict=True):
        require(
            recipe.corpus.identity() == was,
            f"{recipe.corpus.key}: {recipe.corpus.names} changed while it was read: wait until it is complete, then "
            "start again",
        )
    return _with_lines([read_meta(folder / part_name(plan.number)) for plan in plans], recipes, plans)


def _work(
    folder: Path, recipes: list[Recipe], plans: list[PartPlan], workers: int, claims: Claims | None,
    what: str, job: Callable[..., None], done: Callable[[PartPlan], bool],
) -> None:  # fmt: skip
    """Do a job for all plans. With `claims`, do it for those that no other process has claimed, and wait for others."""
    if claims:
        claims.free()
    while missing := [plan for plan in plans if not done(plan)]:
        kind = job.__name__.strip("_")
        mine = (plan for plan in missing if not claims or (claims.take(f"{kind}-{plan.number:05d}") and not done(plan)))
        if (first := next(mine, None)) is None:
            assert claims is not None
            claims.wait()
            continue
        total = sum(plan.unit.size for plan in missing)
        cost = sum(_cost(plan, recipes[plan.owner]) for plan in missing)
        processes = min(workers or cpus(), len(missing), cost // WORTH_A_PROCESS) or 1
        with progress(f"{recipes[0].corpus.key}: {what}", total) as report:
            jobs = ((plan.unit.name, partial(job, folder, plan)) for plan in chain([first], mine))
            run_jobs(jobs, recipes, processes, report)


def _cost(plan: PartPlan, recipe: Recipe) -> int:
    """The bytes of text that take as long to encode as the job of a plan."""
    located = plan.unit.ids is not None and not recipe.selects
    return plan.unit.size // IDS_FASTER if located else plan.unit.size


def _compare(folder: Path, plans: list[PartPlan], work: Callable[..., None], claims: Claims | None) -> None:
    """Find the duplicates among all documents. With `claims`, one process compares the hashes of all processes."""
    digests = [folder / f"digests-{plan.number:05d}" for plan in plans]
    work("comparing", _hash, lambda plan: digests[plan.number].exists())
    marker = folder / "duplicates"
    while not marker.exists():
        if claims is None or claims.take("duplicates"):
            targets = [beside(_duplicates(folder, plan)) for plan in plans]
            find_duplicates(digests, targets)
            for plan, target in zip(plans, targets, strict=True):
                target.replace(_duplicates(folder, plan))
            marker.touch()
        else:
            claims.wait()


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
                file.write(digests_of(map(recipe.content, records)).tobytes())

    _naming_lines(write, plan.unit)
    publish(temporary, target)
    report(plan.unit.size)


def _encode(folder: Path, plan: PartPlan, recipes: list[Recipe], report: Report) -> None:
    """Encode one piece of the text into a part of the token store."""
    recipe = recipes[plan.owner]
    duplicates: set[int] = set()
    if recipe.deduplicate:
        duplicates = set(np.fromfile(_duplicates(folder, plan), "<i8").tolist())
    if plan.unit.ids is not None:
        locate(folder, part_name(plan.number), plan.unit.ids, recipe, duplicates)
        report(plan.unit.size)
        return

    def write(count_lines: bool) -> None:
        maker, counts, number = PartMaker(folder, part_name(plan.number), recipe.encoder.columns), Counter[str](), 0
        bad = BadRecords()
        for items in batches_of(recipe.corpus.read(plan.unit, count_lines)):
            records = recipe.good(items, bad)
            kept = chosen(records, recipe, duplicates, number, counts)
            number += len(records)
            encoded = recipe.encoder.encode([records[index] for index in kept])
            maker.write(encoded)
            report(encoded.text_bytes)
        # Bad records of held-out text were reported before, because the training store was built from the same files.
        maker.finish(counts=counts, bad=None if recipe.held_out and recipe.held_out.chosen else bad)
        report(plan.unit.size - maker.text_bytes)

    _naming_lines(write, plan.unit)


def _count(folder: Path, plan: PartPlan, recipes: list[Recipe], report: Report) -> None:
    """Write the number of bad records in one piece of the text."""
    bad = _bad_of(recipes[plan.owner], plan.unit)
    write_text(_bad_file(folder, plan), json.dumps(asdict(bad)))
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
