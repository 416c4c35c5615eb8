"""Checks that the fragments in a checkpoint's manifest contain each element of each tensor exactly once."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from opt_parallel.config.run import OptimizerName
from opt_parallel.optim import OPTIMIZERS, saved_optimizer
from opt_parallel.parallel.shard import Constant, Shard
from opt_parallel.runtime.errors import UserError

VALUE = 4  # bytes of a float32


def kinds_in(folder: Path, manifest: dict[str, Any]) -> set[str]:
    """The kinds of tensors in a checkpoint: weights, and after the first update the optimizer's moments.

    Raises: UserError if this version does not have the optimizer."""
    if not manifest["updates"]:
        return {"weights"}
    name, known = saved_optimizer(manifest["config"]), [each.value for each in OptimizerName]
    if name not in known:
        raise UserError(
            f"{folder} was trained with optimizer.name={name!r}, which this version does not have (it has "
            f"{', '.join(known)}): choose another checkpoint, or use the version that wrote it"
        )
    return {"weights", *OPTIMIZERS[OptimizerName(name)].moments}


def fault_of(manifest: dict[str, Any], kinds: set[str]) -> str | None:
    """A description of the first error in the fragments of a manifest, or None if there is no error.

    Each fragment must have all `kinds` of tensors. Fragments must not exceed the size of their file, so a tensor cannot
    be larger than the data on the disk."""
    pieces: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for name, tensor in manifest["tensors"].items():
        if tensor["dim"] >= len(tensor["shape"]):
            return f"{name} has no dim {tensor['dim']}"
    for file, written in manifest["files"].items():
        held = {fragment["name"] for fragment in written["fragments"]}
        if len(held) < len(written["fragments"]):
            return f"{file} has two fragments of a tensor"
        for fragment in written["fragments"]:
            wrong = _fault_of_fragment(fragment, manifest["tensors"].get(fragment["name"]), kinds)
            if wrong:
                return f"{file} has a fragment of {fragment['name']} that {wrong}"
            pieces[fragment["name"], fragment["part"]].append((fragment["start"], fragment["count"]))
        if VALUE * len(kinds) * sum(fragment["count"] for fragment in written["fragments"]) > written["bytes"]:
            return f"{file} is smaller than its fragments"
    return _fault_of_pieces(manifest["tensors"], pieces)


def shard_of_part(tensor: dict[str, Any], part: int) -> Shard:
    """The `Shard` of part number `part` of a tensor that a manifest describes."""
    return Shard(tuple(tensor["shape"]), tensor["dim"], part, tensor["parts"], Constant(0), False)


def _fault_of_fragment(fragment: dict[str, Any], tensor: dict[str, Any] | None, kinds: set[str]) -> str | None:
    if tensor is None:
        return "is not among the tensors"
    if fragment["parts"] != tensor["parts"] or fragment["part"] >= tensor["parts"]:
        return f"is of part {fragment['part']} of {fragment['parts']}, not of {tensor['parts']}"
    numel = math.prod(shard_of_part(tensor, fragment["part"]).local_shape)
    if fragment["start"] + fragment["count"] > numel:
        return f"ends beyond its part, which has {numel:,} elements"
    if sorted(fragment["kinds"]) != sorted(kinds):
        return f"has {', '.join(fragment['kinds']) or 'nothing'}, not {', '.join(sorted(kinds))}"
    return None


def _fault_of_pieces(tensors: dict[str, Any], pieces: dict[tuple[str, int], list[tuple[int, int]]]) -> str | None:
    """A description of the first error in the pieces of the tensors, or None if there is no error.

    Pieces must not overlap. Elements of padding are not counted, because a piece may include them or not."""
    found = dict.fromkeys(tensors, 0)
    for (name, part), spans in pieces.items():
        shard, end = shard_of_part(tensors[name], part), 0
        for start, count in sorted(spans):
            if start < end:
                return f"{name} has elements that are in two fragments"
            end = start + count
            found[name] += _real_before(shard, end) - _real_before(shard, start)
    for name, tensor in tensors.items():
        if found[name] != math.prod(tensor["shape"]):
            return f"{name} has {math.prod(tensor['shape']):,} elements, of which {found[name]:,} are in the files"
    return None


def _real_before(shard: Shard, end: int) -> int:
    """The number of the first `end` elements of a flattened part that are not padding."""
    real = shard.range[shard.dim]
    inner = math.prod(shard.shape[shard.dim + 1 :])
    padded_row, row = shard.local_shape[shard.dim] * inner, (real.stop - real.start) * inner
    return end // padded_row * row + min(end % padded_row, row)
