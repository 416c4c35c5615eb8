"""A Hugging Face folder, written whole or not at all, one tensor in memory at a time.

safetensors' own writer wants all tensors of a file at once. The format is a JSON header behind its length, then the
tensors' bytes end to end (huggingface.co/docs/safetensors), so here each tensor is written as it comes and let go.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from opt_parallel.config.model import ModelConfig
from opt_parallel.huggingface.config import CONFIG
from opt_parallel.huggingface.names import INDEX, WEIGHTS, to_hf
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.shard import Shard, Source
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.log import say
from opt_parallel.storage.atomic import new_folder
from opt_parallel.storage.foreign import file_in, read_json

CHECKSUMS, GENERATION_CONFIG = "checksums.json", "generation_config.json"
STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' words

Shapes = dict[str, tuple[int, ...]]  # of the tensors of one file, in the file's order


def write_folder(
    output: Path,
    content: Mapping[str, Any],
    parameters: Iterable[tuple[str, Shard]],
    source: Source,
    dtype: torch.dtype,
    max_shard_size: int,
    files: Mapping[str, bytes] | None = None,
    to_theirs: Callable[[str, Tensor], dict[str, Tensor]] = to_hf,
    group: Group = ALONE,
    replace: bool = False,
    names: tuple[str, str] = (WEIGHTS, CONFIG),
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write `output` under a name beside it and rename it at the end; its configuration comes last.

    Args:
        content: the configuration's.
        parameters: our names with marks of whole tensors, in the order of the files.
        source: gives each whole logical tensor once, in that order. In a `group` every rank asks its own, so that it
            may gather; rank 0 alone writes.
        max_shard_size: bytes of tensors in one file; a larger tensor has a file to itself.
        files: other files, by name.
        to_theirs: a logical tensor under the names in the files.
        replace: an earlier export of that name gives way once the new one is whole; any other folder does not.
        names: of the file of weights, where one is enough, and of the configuration.
        beside: writes folders that belong into the new one, on rank 0, before it has its name.

    Raises: UserError, on every rank alike: the disk is full or closed, or a value is too large for `dtype`.
    """
    parameters = list(parameters)
    tensors = _tensors(parameters, source, to_theirs)
    failure: Exception | None = None
    if group.rank == 0:
        try:
            if os.path.lexists(output) and replace and not (output / CHECKSUMS).is_file():
                raise UserError(f"{output} exists and is no export of ours: move it away, or choose another run.dir")
            with new_folder(output, replace) as partial:
                shards = _plan(parameters, to_theirs, dtype, max_shard_size)
                _write_weights(partial, shards, tensors, dtype, names[0])
                for name, data in (files or {}).items():
                    (partial / name).write_bytes(data)
                beside(partial)
                (partial / names[1]).write_bytes(as_json(content))
        except (OSError, UserError) as error:
            failure = error
    if group.size > 1:
        for _ in tensors:  # what is left of it: everything on the ranks that do not write, which gather all the same
            pass
    if int(all_reduce(torch.tensor(int(failure is not None)), group)):  # every rank asks, or the others would wait
        raise _explained(output, failure)


def generation_config(model: ModelConfig) -> bytes:
    """Content of generation_config.json."""
    return as_json({name: getattr(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})


def checksum(values: Tensor) -> str:
    """CRC-32 of a tensor's bytes as they are stored, in hexadecimal."""
    return f"{zlib.crc32(_bytes(values)):08x}"


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _explained(output: Path, failure: Exception | None) -> UserError:
    if isinstance(failure, UserError):
        return failure
    if isinstance(failure, OSError):
        why = failure.strerror or str(failure)
        if failure.errno in (errno.EEXIST, errno.ENOTEMPTY) and output.exists():
            return UserError(f"{output} exists by now, and was not touched: remove it or choose another folder")
        return UserError(f"{output} cannot be written ({why}), and nothing of it is left: make room, or choose another")
    return UserError(f"{output} was not written: rank 0 could not")


def _tensors(
    parameters: list[tuple[str, Shard]], source: Source, to_theirs: Callable[[str, Tensor], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Their names and values. Nothing here keeps a tensor beyond its turn."""
    for name, shard in parameters:
        yield from to_theirs(name, source(name, shard)).items()


def _plan(
    parameters: list[tuple[str, Shard]],
    to_theirs: Callable[[str, Tensor], dict[str, Tensor]],
    dtype: torch.dtype,
    max_shard_size: int,
) -> list[Shapes]:
    """Which tensors go into which file: in order, each file filled up to the limit."""
    shards: list[Shapes] = []
    room = -math.inf
    for ours, shard in parameters:
        for name, empty in to_theirs(ours, torch.empty(shard.shape, device="meta")).items():
            size = empty.numel() * dtype.itemsize
            if size > room:
                shards.append({})
                room = max_shard_size
            shards[-1][name] = tuple(empty.shape)
            room -= size
    return shards


def _write_weights(
    folder: Path, shards: list[Shapes], tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, single: str
) -> None:
    """The shards, their index if there are several, and the checksums of all tensors."""
    weight_map: dict[str, str] = {}
    checksums: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file_name = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, file_name)
        with open(folder / file_name, "wb") as file:
            file.write(safetensors_header(shapes, dtype))
            for name in shapes:
                checksums[name] = _write_tensor(file, name, next(tensors), dtype)
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shapes in shards for shape in shapes.values())
        (folder / INDEX).write_bytes(as_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / CHECKSUMS).write_bytes(as_json(checksums))


def safetensors_header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    """What a safetensors file begins with: its tensors' names, shapes and places, all of one dtype, end to end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": STORED_AS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8, for those who map the file
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, name: str, tensor: tuple[str, Tensor], dtype: torch.dtype) -> str:
    """Append one tensor; its checksum."""
    assert tensor[0] == name
    values = tensor[1].detach().cpu()
    stored = values.to(dtype)
    if not all(math.isfinite(extreme) for extreme in stored.aminmax()):  # unlike isfinite this takes no memory
        too_large = values[values.isfinite() & ~stored.isfinite()]
        if too_large.numel():
            kind, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
            raise UserError(
                f"{name} has values up to {float(too_large.abs().max()):.4g} and {kind} ends at {largest:.4g}: "
                "choose dtype float32"
            )
        say(f"warning: {name} has values that are not finite (NaN or infinite), written as they are")
    file.write(_bytes(stored))
    return checksum(stored)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def wrong_tensors(folder: Path) -> list[str]:
    """The tensors of an export whose bytes are not those that were written, a line each.
    Nothing where nobody wrote down checksums. Raises: UserError for a file that leads out of the folder."""
    path = file_in(folder, CHECKSUMS)
    if path is None:
        return []
    try:
        written: dict[str, str] = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        return [f"{CHECKSUMS} cannot be read ({one_line(error)})"]
    found: dict[str, str] = {}
    for name, file_name in _tensors_in(folder):
        # what was read counts as this process's memory until its file is closed
        with safe_open(folder / file_name, framework="pt") as file:
            found[name] = checksum(file.get_tensor(name))
    names = {total: name for name, total in written.items()}
    wrong = [name for name in sorted(written.keys() | found.keys()) if written.get(name) != found.get(name)]
    return [f"{name}: not the bytes of {CHECKSUMS}{belonging_to(names.get(found.get(name, '')))}" for name in wrong]


def _tensors_in(folder: Path) -> Iterator[tuple[str, str]]:
    """The names of a folder's tensors, and of their files."""
    for path in sorted(folder.glob("*.safetensors")):
        file_in(folder, path.name)
        with safe_open(path, framework="pt") as file:
            names = file.keys()
        yield from ((name, path.name) for name in names)


def belonging_to(name: str | None) -> str:
    """Whose bytes a tensor has."""
    return "" if name is None else f", but those of {name}"
