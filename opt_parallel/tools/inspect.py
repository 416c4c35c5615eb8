"""Looking at checkpoints: a run's list, what one holds, whether it is whole, how two differ. No process group."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt_parallel.checkpoint.damage import wrong_size
from opt_parallel.checkpoint.folders import best_in
from opt_parallel.checkpoint.manifest import MANIFEST, STEP, Damaged, read_manifest
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.optim import OPTIMIZERS
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.rows import METRICS, Row, rows_of

KINDS = ("weights", *dict.fromkeys(moment for optimizer in OPTIMIZERS.values() for moment in optimizer.moments))
NAME = re.compile(STEP.pattern + r"(?:\.([a-z]+)[0-9]*)?")  # step-300, step-300.abandoned, step-300.abandoned1
LEFT = {  # what the second part of a name says
    "partial": "not finished: being written, or left by a run that was killed",
    "damaged": "renamed: damaged",
    "abandoned": "renamed: the run resumed from an earlier one",
}
SPLIT_AT = 2**22  # elements compared at a time, in float64


@dataclass(frozen=True)
class Listed:
    """A folder among a run's checkpoints. `manifest` is None where it cannot be read; `losses` are of its step."""

    folder: Path
    step: int
    size: int  # bytes of all its files
    state: str
    manifest: dict[str, Any] | None
    losses: dict[str, float | None]


def listed(run: Path) -> list[Listed]:
    """The checkpoints of a run's folder by step, those that are not whole too. Looks at sizes, not into the files.

    Raises: UserError if `run` has none."""
    best = best_in(run / "checkpoints")
    names = {path: NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*")}
    rows = rows_of(run / METRICS)
    found = [_listed(path, int(name[1]), name[2], rows) for path, name in names.items() if name]
    if not found:
        raise UserError(f"{run} has no checkpoints: name a run's folder, such as runs/opt-125m")
    for number, each in enumerate(found):
        if best and each.folder.name == f"step-{best['step']}":
            found[number] = replace(each, state=f"{each.state}, the best")
    return sorted(found, key=lambda each: (each.step, each.folder.name))


def _listed(folder: Path, step: int, aside: str | None, rows: list[Row]) -> Listed:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifest, state = None, f"{MANIFEST} is missing"
    if (folder / MANIFEST).is_file():
        try:
            manifest = read_manifest(folder)
            wrong = (wrong_size(folder, name, written) for name, written in manifest["files"].items())
            state = next(filter(None, wrong), "whole")
        except Damaged as error:
            state = error.what
    losses = losses_at(step, [] if aside else rows)  # which tell of the branch that was gone on with
    return Listed(folder, step, size, LEFT.get(aside or "", state), manifest, losses)


def losses_at(step: int, rows: list[Row]) -> dict[str, float | None]:
    """Training and validation loss, nats a token, that a run's metrics have for this step itself."""
    found = {row["kind"]: row["loss"] for row in rows if row["step"] == step}
    return {kind: found.get(kind) for kind in ("train", "validation")}


def layout_of(manifest: dict[str, Any]) -> str:
    """In a few words."""
    layout = manifest["layout"]
    offload = "" if layout["zero.offload"] == "none" else f", offload {layout['zero.offload']}"
    grid = f"tensor {layout['tensor']} × data {layout['data']}"
    return f"{grid}, ZeRO-{layout['zero.stage']}{offload}, {layout['precision']}"


@dataclass(frozen=True)
class Like:
    """Tensors that are alike but for the number of their layer."""

    name: str
    shape: tuple[int, ...]
    split: str
    number: int

    @property
    def parameters(self) -> int:
        return self.number * math.prod(self.shape)


def groups_of(manifest: dict[str, Any]) -> list[Like]:
    """The logical tensors, those of all layers together."""
    numbers: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, tensor in manifest["tensors"].items():
        split = f"dim {tensor['dim']} in {tensor['parts']}" if tensor["parts"] > 1 else ""
        alike = (re.sub(r"\.\d+\.", ".*.", name), tuple(tensor["shape"]), split)
        numbers[alike] = numbers.get(alike, 0) + 1
    return [Like(*alike, number) for alike, number in numbers.items()]


@dataclass(frozen=True)
class Difference:
    """Of one tensor in two checkpoints: by kind, max |b − a| and ‖b − a‖ / ‖a‖; None where one has no such values."""

    name: str
    kinds: dict[str, tuple[float, float] | None]

    @property
    def rank(self) -> float:
        """The largest relative difference, infinite where it is no number."""
        ratios = [measured[1] for measured in self.kinds.values() if measured is not None]
        return max((math.inf if math.isnan(ratio) else ratio for ratio in ratios), default=0.0)


def only_in_one(a: CheckpointReader, b: CheckpointReader) -> list[str]:
    """Tensors that cannot be compared, and why."""
    lines = [f"{name} is in {a.folder} alone" for name in a.shapes if name not in b.shapes]
    lines += [f"{name} is in {b.folder} alone" for name in b.shapes if name not in a.shapes]
    shapes = {name: (shape, b.shapes[name]) for name, shape in a.shapes.items() if name in b.shapes}
    return lines + [f"{name} is {mine} and {theirs}" for name, (mine, theirs) in shapes.items() if mine != theirs]


def differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[Difference]:
    """Of all tensors that both have in one shape, whatever their layouts; one tensor of each in memory at a time.

    Raises: UserError if a file cannot be read."""
    for name, shape in a.shapes.items():
        if b.shapes.get(name) != shape:
            continue
        kinds: dict[str, tuple[float, float] | None] = {}
        for kind in KINDS:
            mine, theirs = a.read_tensor(kind, name), b.read_tensor(kind, name)
            kinds[kind] = None if mine is None or theirs is None else _compare(mine, theirs)
        yield Difference(name, kinds)


def _compare(a: Tensor, b: Tensor) -> tuple[float, float]:
    """max |b − a| and ‖b − a‖ / ‖a‖, in float64; the second is infinite where `a` alone is zero."""
    largest, squares, of_a = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for mine, theirs in zip(a.view(-1).split(SPLIT_AT), b.view(-1).split(SPLIT_AT), strict=True):
        delta = theirs.double() - mine.double()
        largest = torch.maximum(largest, delta.abs().max())  # which keeps a NaN
        squares += float(delta.square().sum())
        of_a += float(mine.double().square().sum())
    if of_a == 0:
        return float(largest), 0.0 if squares == 0 else math.inf
    return float(largest), math.sqrt(squares / of_a)
