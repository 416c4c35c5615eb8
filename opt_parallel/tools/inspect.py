"""List the checkpoints of a run, show the content of a checkpoint, and compare two checkpoints. No process group is
needed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt_parallel.checkpoint.folders import best_in
from opt_parallel.checkpoint.manifest import MANIFEST, STEP, Damaged, read_manifest, wrong_size
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.optim import OPTIMIZERS
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.rows import METRICS, Row, rows_of

KINDS = ("weights", *dict.fromkeys(moment for optimizer in OPTIMIZERS.values() for moment in optimizer.moments))
NAME = re.compile(STEP.pattern + r"(?:\.([a-z]+)[0-9]*)?")  # Step-300, step-300.abandoned, step-300.abandoned1.
STATES = {  # The meaning of the suffix of a checkpoint's folder name.
    "partial": "incomplete: being written, or left by a killed run",
    "damaged": "renamed: damaged",
    "abandoned": "renamed: the run resumed from an earlier checkpoint",
}
CHUNK = 2**22  # number of elements compared at a time in float64


@dataclass(frozen=True)
class Listed:
    """A folder in a run's `checkpoints` folder. `manifest` is None if the manifest cannot be read. `losses` are the
    losses at the checkpoint's step."""

    folder: Path
    step: int
    size: int  # bytes of all files of the checkpoint
    state: str
    manifest: dict[str, Any] | None
    losses: dict[str, float | None]


def listed(run: Path) -> list[Listed]:
    """The complete and incomplete checkpoints in a run's folder, sorted by step. Files are checked by size and not by
    content.

    Raises: UserError if the folder `run` has no checkpoints."""
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


def _listed(folder: Path, step: int, suffix: str | None, rows: list[Row]) -> Listed:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifest, state = None, f"{MANIFEST} is missing"
    if (folder / MANIFEST).is_file():
        try:
            manifest = read_manifest(folder)
            wrong = (wrong_size(folder, name, written) for name, written in manifest["files"].items())
            state = next(filter(None, wrong), "complete")
        except Damaged as error:
            state = error.what
        except UserError:
            state = "of a later version"
    losses = losses_at(step, [] if suffix else rows)  # a renamed checkpoint has no rows in the metrics
    return Listed(folder, step, size, STATES.get(suffix or "", state), manifest, losses)


def losses_at(step: int, rows: list[Row]) -> dict[str, float | None]:
    """The training and validation loss in nats per token at exactly this step of a run, from its rows of metrics."""
    found = {row["kind"]: row["loss"] for row in rows if row["step"] == step}
    return {kind: found.get(kind) for kind in ("train", "validation")}


def layout_of(manifest: dict[str, Any]) -> str:
    """The layout of a checkpoint as one readable line."""
    layout = manifest["layout"]
    offload = "" if layout["zero.offload"] == "none" else f", offload {layout['zero.offload']}"
    grid = f"tensor {layout['tensor']} × data {layout['data']}"
    return f"{grid}, ZeRO-{layout['zero.stage']}{offload}, {layout['precision']}"


@dataclass(frozen=True)
class TensorGroup:
    """The tensors of a checkpoint whose names differ only in the layer's index."""

    name: str
    shape: tuple[int, ...]
    split: str
    number: int

    @property
    def parameters(self) -> int:
        return self.number * math.prod(self.shape)


def groups_of(manifest: dict[str, Any]) -> list[TensorGroup]:
    """The full (unsplit) tensors of a checkpoint, with one group for the same tensor of all layers."""
    numbers: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, tensor in manifest["tensors"].items():
        split = f"dim {tensor['dim']} in {tensor['parts']}" if tensor["parts"] > 1 else ""
        key = (re.sub(r"\.\d+\.", ".*.", name), tuple(tensor["shape"]), split)
        numbers[key] = numbers.get(key, 0) + 1
    return [TensorGroup(*key, number) for key, number in numbers.items()]


@dataclass(frozen=True)
class Difference:
    """The differences of a tensor between two checkpoints a and b. Each kind (weights or a moment) has max |b − a| and
    ‖b − a‖ / ‖a‖, or None if a checkpoint has no values of this kind."""

    name: str
    kinds: dict[str, tuple[float, float] | None]

    @property
    def rank(self) -> float:
        """The largest relative difference among the weights and moments. NaN counts as infinite."""
        ratios = [measured[1] for measured in self.kinds.values() if measured is not None]
        return max((math.inf if math.isnan(ratio) else ratio for ratio in ratios), default=0.0)


def only_in_one(a: CheckpointReader, b: CheckpointReader) -> list[str]:
    """One line for each tensor that cannot be compared, with the reason."""
    lines = [f"{name} is only in {a.folder}" for name in a.shapes if name not in b.shapes]
    lines += [f"{name} is only in {b.folder}" for name in b.shapes if name not in a.shapes]
    shapes = {name: (shape, b.shapes[name]) for name, shape in a.shapes.items() if name in b.shapes}
    lines += [f"{name} has the shapes {mine} and {theirs}" for name, (mine, theirs) in shapes.items() if mine != theirs]
    return lines


def differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[Difference]:
    """The differences of all tensors that have the same shape in both checkpoints, which may have different layouts.
    Only one tensor of each checkpoint is in memory at a time.

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
    """max |b − a| and ‖b − a‖ / ‖a‖, computed in float64. The ratio is infinite if `a` is zero and `b` is not."""
    largest, squares_of_delta, squares_of_a = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for mine, theirs in zip(a.view(-1).split(CHUNK), b.view(-1).split(CHUNK), strict=True):
        delta = theirs.double() - mine.double()
        largest = torch.maximum(largest, delta.abs().max())  # propagates NaN
        squares_of_delta += float(delta.square().sum())
        squares_of_a += float(mine.double().square().sum())
    if squares_of_a == 0:
        return float(largest), 0.0 if squares_of_delta == 0 else math.inf
    return float(largest), math.sqrt(squares_of_delta / squares_of_a)
