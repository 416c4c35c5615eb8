"""Writes a Hugging Face folder, complete or not at all, with one tensor in memory at a time.

safetensors' own writer needs all tensors of a file at once. The format is the length of a JSON header, the header, and
the tensors' bytes end to end (huggingface.co/docs/safetensors), so here each tensor is written and freed in turn.
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
from opt_parallel.huggingface.config import CONFIG, as_json
from opt_parallel.huggingface.names import INDEX, WEIGHTS, to_hf
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.shard import Shard, Source
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.log import say
from opt_parallel.storage.atomic import new_folder
from opt_parallel.storage.foreign import file_in, read_json

CHECKSUMS, GENERATION_CONFIG = "checksums.json", "generation_config.json"
STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names of dtypes

Shapes = dict[str, tuple[int, ...]]  # the tensors of one file, in the file's order


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
    """Write the folder `output` under a temporary name, the configuration last, and rename it at the end.

    Args:
        content: of the configuration.
        parameters: our names, with marks of unsplit tensors, in the order of the files.
        source: gives each full logical tensor once, in that order. In a `group` every rank calls its own source, which
            may gather; only rank 0 writes.
        max_shard_size: bytes of tensors in one file; a larger tensor gets a file of its own.
        files: other files, by name.
        to_theirs: maps a logical tensor to the tensors, by name, in the files.
        replace: replace an earlier export at `output` when the new one is complete; any other folder is an error.
        names: of the weights' file, if there is only one, and of the configuration.
        beside: writes further folders into the new one, on rank 0, before it is renamed.

    Raises: UserError, on every rank: the disk is full or not writable, or a value is too large for `dtype`.
    """
    parameters = list(parameters)
    tensors = _tensors(parameters, source, to_theirs)
    failure: Exception | None = None
    if group.rank == 0:
        try:
            if os.path.lexists(output) and replace and not (output / CHECKSUMS).is_file():
                raise UserError(f"{output} exists and is not our export: move it away, or choose another run.dir")
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
        for _ in tensors:  # the tensors that this rank has not written: every rank must join every gather
            pass
    if int(all_reduce(torch.tensor(int(failure is not None)), group)):  # every rank calls this
        raise _explained(output, failure)


def generation_config(model: ModelConfig) -> bytes:
    """Content of generation_config.json."""
    return as_json({name: getattr(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})


def checksum(values: Tensor) -> str:
    """CRC-32 of a tensor's stored bytes, in hexadecimal."""
    return f"{zlib.crc32(_bytes(values)):08x}"


def _explained(output: Path, failure: Exception | None) -> UserError:
    if isinstance(failure, UserError):
        return failure
    if isinstance(failure, OSError):
        why = failure.strerror or str(failure)
        if failure.errno in (errno.EEXIST, errno.ENOTEMPTY) and output.exists():
            return UserError(f"{output} has been created meanwhile: remove it or choose another folder")
        return UserError(
            f"{output} cannot be written ({why}), and its partial files were removed: make room, or choose another "
            "folder"
        )
    return UserError(f"{output} was not written: rank 0 could not")


def _tensors(
    parameters: list[tuple[str, Shard]], source: Source, to_theirs: Callable[[str, Tensor], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the tensors in the files. Keeps no reference to a tensor that was yielded."""
    for name, shard in parameters:
        yield from to_theirs(name, source(name, shard)).items()


def _plan(
    parameters: list[tuple[str, Shard]],
    to_theirs: Callable[[str, Tensor], dict[str, Tensor]],
    dtype: torch.dtype,
    max_shard_size: int,
) -> list[Shapes]:
    """The tensors of each file: in order, each file filled up to the limit."""
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
    """Write the files of weights, their index if there are several, and the checksums of all tensors."""
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
    """The start of a safetensors file: the length of the header, and the names, shapes and offsets of tensors of one
    dtype that are stored end to end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": STORED_AS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes, for programs that map the file
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, name: str, tensor: tuple[str, Tensor], dtype: torch.dtype) -> str:
    """Append one tensor to the file, and return its checksum."""
    assert tensor[0] == name
    values = tensor[1].detach().cpu()
    stored = values.to(dtype)
    if not all(math.isfinite(extreme) for extreme in stored.aminmax()):  # unlike isfinite, allocates nothing
        too_large = values[values.isfinite() & ~stored.isfinite()]
        if too_large.numel():
            kind, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
            raise UserError(
                f"{name} has values up to {float(too_large.abs().max()):.4g}, and {kind} ends at {largest:.4g}: "
                "choose dtype float32"
            )
        say(f"warning: {name} has values that are not finite (NaN or infinite), written unchanged")
    file.write(_bytes(stored))
    return checksum(stored)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def wrong_tensors(folder: Path) -> list[str]:
    """The tensors of an export whose bytes differ from their checksums, a line each. Empty if the folder has no
    checksums. Raises: UserError for a link that leads out of the folder."""
    path = file_in(folder, CHECKSUMS)
    if path is None:
        return []
    try:
        written: dict[str, str] = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        return [f"{CHECKSUMS} cannot be read ({one_line(error)})"]
    found: dict[str, str] = {}
    for name, file_name in _tensors_in(folder):
        # opened for each tensor: pages that were read count as this process's memory until the file is closed
        with safe_open(folder / file_name, framework="pt") as file:
            found[name] = checksum(file.get_tensor(name))
    names = {total: name for name, total in written.items()}
    wrong = [name for name in sorted(written.keys() | found.keys()) if written.get(name) != found.get(name)]
    return [f"{name}: differs from {CHECKSUMS}{belonging_to(names.get(found.get(name, '')))}" for name in wrong]


def _tensors_in(folder: Path) -> Iterator[tuple[str, str]]:
    """The names of a folder's tensors, each with its file's name."""
    for path in sorted(folder.glob("*.safetensors")):
        file_in(folder, path.name)
        with safe_open(path, framework="pt") as file:
            names = file.keys()
        yield from ((name, path.name) for name in names)


def belonging_to(name: str | None) -> str:
    """For messages: the name of the tensor whose bytes were found."""
    return "" if name is None else f", and holds the bytes of {name}"
