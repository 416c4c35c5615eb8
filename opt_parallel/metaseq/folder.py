"""Describes a metaseq checkpoint: its form, its network, and where the values of each full tensor are.

No values are read, and torch is not imported. A description is complete before the first rank reads a weight.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from opt_parallel.config.model import ModelConfig
from opt_parallel.metaseq.arrays import array_in
from opt_parallel.metaseq.files import EMBEDDING, Group, group_in
from opt_parallel.metaseq.layout import layout_of
from opt_parallel.metaseq.parts import FLAT, File, Layout, flat_tensors, joined, named_tensors, open_files
from opt_parallel.metaseq.settings import Settings, network, settings_of
from opt_parallel.metaseq.stored import Block, Full, Ranges, Stored
from opt_parallel.runtime.errors import UserError

DROPPED = {"decoder.version", "decoder.embed_positions._float_tensor"}  # They are no weights.
TIED = ("decoder.output_projection.weight", "lm_head.weight")  # A second copy of the embedding, in some files.
RENAMED = {
    "decoder.layer_norm.": "decoder.final_layer_norm.", "decoder.project_in_dim.": "decoder.project_in.",
    "decoder.project_out_dim.": "decoder.project_out.",
}  # fmt: skip
BY_ROWS = re.compile(r"decoder\.embed_tokens\.weight|.*\.(?:q_proj|k_proj|v_proj|qkv_proj|fc1)\.(?:weight|bias)")
BY_COLUMNS = re.compile(r".*\.(?:out_proj|fc2)\.weight")
QKV = re.compile(r"(?P<before>.*\.self_attn\.)(?P<which>q|k|v|qkv)_proj\.(?P<kind>weight|bias)")
STACKED = "qkv"  # The order of the three in this package's parameter.
FUSED = "kvq"  # Their order in a part of metaseq's fused parameter.


Assembling = dict[str, tuple[tuple[int, ...], list[Block], list[Stored]]]  # shape, blocks, further copies


@dataclass(frozen=True)
class Description:
    """A metaseq checkpoint. `tensors` are its full tensors by this package's names. `tied` is its second copy of the
    embedding, if it has one whose values lie elsewhere."""

    folder: Path
    form: str
    files: tuple[Path, ...]
    parts: int
    shards: int
    config: ModelConfig
    tensors: dict[str, Full]
    tied: Full | None

    @property
    def dtypes(self) -> set[str]:
        return {block.stored.flat.dtype for full in self.tensors.values() for block in full.blocks}

    @property
    def nbytes(self) -> int:
        """The bytes of the full tensors. The files have more, because parts hold copies."""
        return sum(math.prod(full.shape) * full.blocks[0].stored.flat.item for full in self.tensors.values())


def describe(folder: Path) -> Description:
    """The checkpoint in `folder`. Raises: UserError if it is ambiguous, incomplete, damaged or no network of OPT."""
    with os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return _described(folder.absolute(), tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)))


@lru_cache(maxsize=2)
def _described(folder: Path, state: tuple[tuple[str, int, int], ...]) -> Description:
    """The description of a folder in a `state`. It is kept, because a run asks for it several times."""
    group = group_in(folder)
    parts, settings, form = _arrays_of(group) if group.arrays else _parts_of(folder, group)
    _require_equal_parts(group, parts)
    shapes, tensors = _assembled(folder, parts)
    config = network(folder, settings, shapes)
    tied = next((tensors.pop(name) for name in TIED if name in tensors), None)
    if tied and [block.stored for block in tied.blocks] == [block.stored for block in tensors[EMBEDDING].blocks]:
        tied = None
    return Description(folder, form, tuple(group.paths), group.parts, group.shards, config, tensors, tied)


def _arrays_of(group: Group) -> tuple[list[dict[str, Stored]], Settings, str]:
    found = {name: array_in(path) for name, path in sorted(group.arrays.items())}
    tensors = {name: stored for name, stored in found.items() if stored is not None and name not in DROPPED}
    return [tensors], settings_of({}), "one NumPy file for each tensor"


def _parts_of(folder: Path, group: Group) -> tuple[list[dict[str, Stored]], Settings, str]:
    """The tensors of each part, the settings, and the form in words."""
    files = open_files(group)
    settings = files[0, 0].settings
    flat = any(FLAT.fullmatch(name) for name in files[0, 0].tensors)
    by_part = [[files[part, shard] for shard in range(group.shards)] for part in range(group.parts)]
    if flat:
        parts = [_with_others(files, flat_tensors(files, _layout(folder, files, group, settings))) for files in by_part]
    elif group.shards == 1:
        parts = [_with_others(files, {}) for files in by_part]
    else:
        raise UserError(
            f"{folder}: its {group.shards} shards hold named tensors, so they are not cut by FSDP: use a complete copy"
        )
    described = " with shard_metadata" if flat and files[0, 0].layout else ""
    what = f"flat tensors{described}" if flat else "named tensors"
    shards = f" of {group.shards} FSDP shards each" if group.shards > 1 else ""
    many = f"{group.parts} model part{'s' * (group.parts > 1)}{shards}"
    return parts, settings, f"{many}, {what}"


def _layout(folder: Path, files: list[File], group: Group, settings: Settings) -> Layout:
    if files[0].layout:
        return files[0].layout
    lengths = {name: joined(files, name).length * len(files) for name in files[0].tensors if FLAT.fullmatch(name)}
    return layout_of(folder, lengths, len(files), group.parts, settings)


def _with_others(files: list[File], tensors: dict[str, Stored]) -> dict[str, Stored]:
    """`tensors` and the tensors that the first shard of a part stores under their own names."""
    named = {name: stored for name, stored in named_tensors(files[0]).items() if not FLAT.fullmatch(name)}
    return {name: stored for name, stored in {**named, **tensors}.items() if name not in DROPPED}


def _require_equal_parts(group: Group, parts: list[dict[str, Stored]]) -> None:
    """Raise UserError unless all parts hold tensors of the same names and shapes."""
    for number, part in enumerate(parts):
        for name in sorted(parts[0].keys() | part.keys()):
            here, first = (each[name].shape if name in each else "missing" for each in (part, parts[0]))
            if here != first:
                raise UserError(
                    f"{group.files[number, 0]}: {name} is {here}, but in {group.files[0, 0].name} it is {first}: use "
                    "files of one checkpoint"
                )


def _assembled(folder: Path, parts: list[dict[str, Stored]]) -> tuple[dict[str, tuple[int, ...]], dict[str, Full]]:
    """The shapes of the full tensors by metaseq's names, and the full tensors by this package's names.

    Raises: UserError if parts are missing, as the shapes of matrices tell."""
    shapes: dict[str, tuple[int, ...]] = {}
    full: Assembling = {}
    for name, first in parts[0].items():
        cut = 0 if BY_ROWS.fullmatch(name) or name in TIED else 1 if BY_COLUMNS.fullmatch(name) else None
        if cut == 1 and name.endswith("out_proj.weight") and first.shape[1] * len(parts) != first.shape[0]:
            raise UserError(
                f"{folder}: {name} is cut for {first.shape[0] // max(first.shape[1], 1)} parts (its shape is "
                f"{first.shape}), but the folder has {len(parts)}: use a complete copy"
            )
        shape = tuple(size * len(parts) if dim == cut else size for dim, size in enumerate(first.shape))
        shapes[name] = shape
        ours, blocks = _blocks(folder, name, shape, cut, [part[name] for part in parts])
        stacked = QKV.fullmatch(name)
        if stacked:
            size = shape[0] // 3 if stacked["which"] == "qkv" else shape[0]
            shape = (3, size, *shape[1:])
        copies = [part[name] for part in parts[1:]] if cut is None else []
        entry = full.setdefault(ours, (shape, [], copies))
        if entry[0] != shape:
            raise UserError(f"{folder}: {name} has another shape than the tensors beside it: use a complete copy")
        entry[1].extend(blocks)
    _require_all_three(folder, full, len(parts))
    return shapes, {name: Full(shape, tuple(blocks), tuple(copies)) for name, (shape, blocks, copies) in full.items()}


def _blocks(
    folder: Path, name: str, shape: tuple[int, ...], cut: int | None, stored: list[Stored]
) -> tuple[str, list[Block]]:
    """This package's name of the full tensor that a stored tensor belongs to, and the blocks that the parts hold."""
    everything = tuple(slice(0, size) for size in shape)
    match = QKV.fullmatch(name)
    if match is None:
        prefix = next((each for each in RENAMED if name.startswith(each)), "")
        ours = RENAMED.get(prefix, "") + name.removeprefix(prefix)
        if cut is None:
            return ours, [Block(everything, stored[0], 0)]
        return ours, [Block(_part(everything, cut, number, each), each, 0) for number, each in enumerate(stored)]
    ours = f"{match['before']}qkv_proj.{match['kind']}"
    order = FUSED if match["which"] == "qkv" else match["which"]
    if stored[0].rows % len(order):
        raise UserError(f"{folder}: {name} has {stored[0].rows} rows, which are not three equal parts")
    return ours, list(_stacked(order, stored))


def _stacked(order: str, stored: list[Stored]) -> Iterator[Block]:
    """The blocks of the parameter (3, H, H) that stacks query, key and value, of which each part holds `order`."""
    for number, each in enumerate(stored):
        rows = each.rows // len(order)
        for place, which in enumerate(order):
            block = STACKED.index(which)
            ranges = (slice(block, block + 1), slice(number * rows, (number + 1) * rows))
            yield Block((*ranges, *(slice(0, size) for size in each.shape[1:])), each, place * rows)


def _part(everything: Ranges, cut: int, number: int, stored: Stored) -> Ranges:
    size = stored.shape[cut]
    return (*everything[:cut], slice(number * size, (number + 1) * size), *everything[cut + 1 :])


def _require_all_three(folder: Path, full: Assembling, parts: int) -> None:
    """Raise UserError if a query, key or value is missing or occurs twice."""
    for name, (_, blocks, _) in full.items():
        held = [block.ranges[0].start for block in blocks]
        if ".qkv_proj." in name and [held.count(which) for which in range(3)] != [parts] * 3:
            raise UserError(f"{folder}: query, key or value of {name} is missing or occurs twice: use a complete copy")
