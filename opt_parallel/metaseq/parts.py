"""Opens the files of a checkpoint, and finds the tensors of each model part in them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opt_parallel.metaseq.archive import Archive, open_archive, start_of
from opt_parallel.metaseq.files import Group
from opt_parallel.metaseq.pickled import Located, item, mapping, whole_numbers
from opt_parallel.metaseq.settings import Settings, settings_of
from opt_parallel.metaseq.stored import Flat, Piece, Stored
from opt_parallel.runtime.errors import UserError

FLAT = re.compile(r"(?:(?P<module>.+)\.)?flat_param_\d+")
CHUNK = 1 << 20  # Number of bytes that are compared at a time.
LONGEST_NAME = 500

Layout = dict[str, tuple[tuple[str, tuple[int, ...]], ...]]
"""The names and shapes of the tensors in each flat tensor, in their order."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in one file, and the file's record that has its values."""

    located: Located
    piece: Piece
    size: int  # bytes of the record
    crc: int

    @property
    def length(self) -> int:
        return math.prod(self.located.shape)


@dataclass(frozen=True)
class File:
    """The tensors in one file, the layout of its flat tensors if the file has one, and its settings."""

    path: Path
    tensors: dict[str, Tensor]
    layout: Layout
    settings: Settings


def open_files(group: Group) -> dict[tuple[int, int], File]:
    """The opened files of a checkpoint by part and shard.

    Raises: UserError if a file is damaged, occurs twice, or belongs to another run."""
    files: dict[tuple[int, int], File] = {}
    first: File | None = None
    for number, path in sorted(group.files.items()):
        file = _opened(path)
        first = first or file
        _require_same_run(first, file)
        # Equal descriptions are kept once, because a thousand shards have them.
        files[number] = replace(file, layout=first.layout, settings=first.settings)
    _require_no_copy(list(files.values()))
    return files


def _opened(path: Path) -> File:
    archive = open_archive(path)
    state = mapping(archive.content).get("model", archive.content)
    tensors: dict[str, Tensor] = {}
    for key, value in mapping(state).items():
        if type(key) is str and isinstance(value, Located):
            name = key.removeprefix("model.") if key.startswith("model.decoder.") else key
            if len(name) > LONGEST_NAME or not name.isprintable():
                raise UserError(f"{path}: {name!r:.80} is not the name of a tensor of OPT: use a complete copy")
            tensors[name] = _tensor(archive, name, value)
    if not any(name.startswith("decoder.") or FLAT.fullmatch(name) for name in tensors):
        raise UserError(f"{path} holds no weights of metaseq's OPT: name a folder with a checkpoint of OPT")
    return File(path, tensors, _layout(path, archive.content), settings_of(archive.content))


def _tensor(archive: Archive, name: str, located: Located) -> Tensor:
    record = archive.records.get(f"data/{located.storage.key}")
    item = 0 if record is None else Flat((), 0, located.storage.dtype).item
    if record is None or located.storage.count * item > record.size:
        raise UserError(f"{archive.path}: the record of {name} is missing or ends early: use a complete copy")
    return Tensor(located, Piece(archive.path, record.header, 0), record.size, record.crc)


def _layout(path: Path, content: object) -> Layout:
    """The layout in a file's `shard_metadata`, or nothing. Raises: UserError if it is malformed."""
    layout: Layout = {}
    entries = item(content, "shard_metadata", "param_metadata")
    for entry in entries if isinstance(entries, list) else []:
        module = item(entry, "fsdp_path") or ""
        for flat, about in mapping(item(entry, "params")).items():
            try:
                names, shapes, numels = (_list(item(about, key)) for key in ("names", "shapes", "numels"))
                sizes = [tuple(whole_numbers(shape)) for shape in shapes]
                if [math.prod(shape) for shape in sizes] != numels:
                    raise ValueError("its shapes and numels differ")
                if not all(type(name) is str for name in (module, *names)):
                    raise ValueError("a name is not text")
                full = (f"{module}.{name}" if module else name for name in names)
                layout[f"{module}.{flat}" if module else flat] = tuple(zip(full, sizes, strict=True))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}: shard_metadata is malformed ({error}): use a complete copy") from error
    return layout


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a list is missing")
    return value


def _require_same_run(first: File, file: File) -> None:
    """Raise UserError unless both files hold the same tensors of the same run."""
    where = f"{file.path} does not belong to the same checkpoint as {first.path.name}: "
    for name, value in first.settings.identity().items():
        other = file.settings.identity()[name]
        if value is not None and other is not None and value != other:
            raise UserError(f"{where}{name} is {other!s:.80}, not {value!s:.80}; use files of one run and one step")
    apart = sorted(first.tensors.keys() ^ file.tensors.keys())
    if apart:
        raise UserError(f"{where}only one of them has {apart[0]}; use files of one checkpoint")
    if first.layout != file.layout:
        raise UserError(f"{where}their shard_metadata differ; use files of one checkpoint")


def _require_no_copy(files: list[File]) -> None:
    """Raise UserError if two files have the same values. Values are read only if all checksums of the files agree."""
    seen: dict[tuple[int, ...], File] = {}
    for file in files:
        sums = tuple(tensor.crc for tensor in file.tensors.values())
        other = seen.setdefault(sums, file)
        if other is not file and _same_values(other, file):
            raise UserError(f"{file.path} is a copy of {other.path.name}: use a complete copy of the checkpoint")


def _same_values(one: File, other: File) -> bool:
    """Whether the largest tensors of two files are equal and not zero. Shards of padding only are zero."""
    name = max(one.tensors, key=lambda name: one.tensors[name].size)
    zero = True
    for a, b in zip(_content(one.tensors[name]), _content(other.tensors[name]), strict=False):
        if a != b:
            return False
        zero = zero and not any(a)
    return not zero


def _content(tensor: Tensor) -> Iterator[bytes]:
    with open(tensor.piece.path, "rb") as file:
        assert tensor.piece.header is not None
        start = tensor.piece.header + start_of(os.pread(file.fileno(), CHUNK, tensor.piece.header))
        for done in range(0, tensor.size, CHUNK):
            yield os.pread(file.fileno(), min(CHUNK, tensor.size - done), start + done)


def named_tensors(file: File) -> dict[str, Stored]:
    """The tensors of a file that stores each tensor under its name. Raises: UserError if a tensor is transposed."""
    found: dict[str, Stored] = {}
    for name, tensor in file.tensors.items():
        located = tensor.located
        shape, stride = located.shape, located.stride
        if not shape:
            continue
        width = math.prod(shape[1:])
        step = stride[0] if shape[0] > 1 else width
        inner = any(shape[dim] > 1 and stride[dim] != math.prod(shape[dim + 1 :]) for dim in range(1, len(shape)))
        if inner or step < width:
            raise UserError(
                f"{file.path}: {name} is stored with the strides {stride}: load it with torch.load(…, "
                "weights_only=True), make its tensors contiguous, and write it again with torch.save"
            )
        flat = Flat((tensor.piece,), located.storage.count, located.storage.dtype)
        found[name] = Stored(flat, located.offset, shape, step)
    return found


def flat_tensors(files: list[File], layout: Layout) -> dict[str, Stored]:
    """The tensors of one part, whose shards are `files`, from its flat tensors.

    Raises: UserError if the lengths of the shards do not fit the layout."""
    found: dict[str, Stored] = {}
    for flat_name in files[0].tensors:
        if not FLAT.fullmatch(flat_name):
            continue
        if flat_name not in layout:
            raise UserError(f"{files[0].path}: shard_metadata does not describe {flat_name}: use a complete copy")
        flat = joined(files, flat_name)
        total = sum(math.prod(shape) for _, shape in layout[flat_name])
        _require_length(files, flat_name, total, flat.length)
        start = 0
        for name, shape in layout[flat_name]:
            found[name] = Stored(flat, start, shape, math.prod(shape[1:]))
            start += math.prod(shape)
    return found


def joined(files: list[File], name: str) -> Flat:
    """The flat tensor `name` of one part, in the order of its shards. Raises: UserError."""
    tensors = [file.tensors[name] for file in files]
    kinds = {tensor.located.storage.dtype for tensor in tensors}
    for file, tensor in zip(files, tensors, strict=True):
        if tensor.length != tensors[0].length or len(tensor.located.shape) != 1 or len(kinds) > 1:
            raise UserError(
                f"{file.path}: {name} has {tensor.length:,} elements of {tensor.located.storage.dtype}, but "
                f"{tensors[0].length:,} of {tensors[0].located.storage.dtype} in {files[0].path.name}: use a complete "
                "copy"
            )
    dtype = tensors[0].located.storage.dtype
    item = Flat((), 0, dtype).item
    pieces = tuple(replace(each.piece, skip=each.located.offset * item) for each in tensors)
    return Flat(pieces, tensors[0].length, dtype)


def _require_length(files: list[File], name: str, total: int, length: int) -> None:
    """Raise UserError unless shards of `length` elements are `total` elements, cut as fairscale cuts them."""
    if length == -(-total // len(files)):
        return
    cut = -(-total // length) if length else 0
    raise UserError(
        f"{files[0].path.parent}: {name} has {total:,} elements, but {len(files)} shards of {length:,} elements do not "
        f"add up to it (they are cut for {cut} shards): use a complete copy"
    )
