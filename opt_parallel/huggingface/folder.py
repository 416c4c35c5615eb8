"""Writes a Hugging Face model folder atomically, with one tensor in memory at a time.

The writer of the library safetensors needs all tensors of a file at once. So this module writes the format itself: the
length of a JSON header, the header, and the bytes of all tensors in order (huggingface.co/docs/safetensors).
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
from opt_parallel.storage.atomic import into_folder, new_folder
from opt_parallel.storage.foreign import file_in, read_json

CHECKSUMS, GENERATION_CONFIG = "checksums.json", "generation_config.json"
MODEL_FILES = (
    CONFIG, GENERATION_CONFIG, CHECKSUMS, "*.safetensors", "pytorch_model*.bin", "*.h5", "*.msgpack", "*.index.json",
)  # fmt: skip
STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # the names of dtypes in safetensors
PIECE = 1 << 20  # Number of bytes that are written at a time.

Shapes = dict[str, tuple[int, ...]]  # the names and shapes of the tensors in one file, in order


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
    add: bool = False,
    names: tuple[str, str] = (WEIGHTS, CONFIG),
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model folder under a temporary name, with the configuration last, and rename the folder to `output`.

    Args:
        content: the content of the configuration.
        parameters: the names of the full tensors in this package, with their marks, in the order of the files.
        source: returns each full tensor once, in the order of `parameters`. Every rank of the `group` calls its own
            source, which may gather a tensor from all ranks. Only rank 0 writes.
        max_shard_size: maximum bytes of the tensors in one file. A larger tensor gets its own file.
        files: other files to write, by name.
        to_theirs: maps a full tensor to the tensors in the files, by name.
        replace: whether to replace an earlier export at `output`. Any other folder at `output` is an error.
        add: whether to move the files into the folder `output`, which exists and holds no model.
        names: the file names of the weights (if they are in one file) and of the configuration.
        beside: writes subfolders into the temporary folder, on rank 0.

    Raises: UserError on every rank, if the disk is full or not writable, or if a value is too large for `dtype`.
    """
    parameters = list(parameters)
    tensors = _tensors(parameters, source, to_theirs)
    failure: Exception | None = None
    if group.rank == 0:
        try:
            if os.path.lexists(output) and replace and not (output / CHECKSUMS).is_file():
                raise UserError(
                    f"{output} exists and was not written by an export: move it away, or choose another run.dir"
                )
            with into_folder(output, names[1]) if add else new_folder(output, replace) as partial:
                shards = _plan(parameters, to_theirs, dtype, max_shard_size)
                _write_weights(partial, shards, tensors, dtype, names[0])
                for name, data in (files or {}).items():
                    (partial / name).write_bytes(data)
                beside(partial)
                (partial / names[1]).write_bytes(as_json(content))
        except (OSError, UserError) as error:
            failure = error
    if group.size > 1:
        for _ in tensors:  # reads the tensors that this rank has not written, because every rank must join each gather
            pass
    if int(all_reduce(torch.tensor(int(failure is not None)), group)):  # every rank calls this
        raise _explained(output, failure)


def model_file(folder: Path, *others: str) -> str | None:
    """The name of a file in `folder` that belongs to a model or is one of `others`, or None."""
    patterns = (*MODEL_FILES, *others)
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def generation_config(model: ModelConfig) -> bytes:
    """The content of generation_config.json."""
    return as_json({name: getattr(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})


def checksum(values: Tensor) -> str:
    """The CRC-32 checksum of a tensor's bytes, in hexadecimal."""
    return f"{zlib.crc32(_bytes(values)):08x}"


def _explained(output: Path, failure: Exception | None) -> UserError:
    if isinstance(failure, UserError):
        return failure
    if isinstance(failure, OSError):
        why = failure.strerror or str(failure)
        if failure.errno in (errno.EEXIST, errno.ENOTEMPTY) and output.exists():
            return UserError(f"{output} was created by another program: remove it or choose another folder")
        return UserError(
            f"{output} cannot be written ({why}), and its partial files were removed: free disk space, or choose "
            "another folder"
        )
    return UserError(f"{output} was not written, because rank 0 failed: see its error message")


def _tensors(
    parameters: list[tuple[str, Shard]], source: Source, to_theirs: Callable[[str, Tensor], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The names and values of the tensors in the files. The generator keeps no reference to a yielded tensor."""
    for name, shard in parameters:
        yield from to_theirs(name, source(name, shard)).items()


def _plan(
    parameters: list[tuple[str, Shard]],
    to_theirs: Callable[[str, Tensor], dict[str, Tensor]],
    dtype: torch.dtype,
    max_shard_size: int,
) -> list[Shapes]:
    """The names and shapes of the tensors of each file. Tensors keep their order and fill each file up to the limit."""
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
    """Write the weight files, the checksums of all tensors, and an index if there are several weight files."""
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
    """The first bytes of a safetensors file: the length of the header, and the header.

    The header has the names, shapes and offsets of the tensors, which have the same dtype and no gaps between them."""
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
    if not all(math.isfinite(extreme) for extreme in stored.aminmax()):  # unlike isfinite, aminmax allocates no mask
        too_large = values[values.isfinite() & ~stored.isfinite()]
        if too_large.numel():
            kind, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
            raise UserError(
                f"{name} has values up to {float(too_large.abs().max()):.4g}, but the largest value of {kind} is "
                f"{largest:.4g}: choose dtype float32"
            )
        say(f"warning: {name} has values that are not finite (NaN or infinite), and they are written unchanged")
    content, total = _bytes(stored), 0
    for start in range(0, len(content), PIECE):  # a piece is still in the processor's cache when it is written
        piece = content[start : start + PIECE]
        total = zlib.crc32(piece, total)
        file.write(piece)
    return f"{total:08x}"


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def wrong_tensors(folder: Path) -> list[str]:
    """A message for each tensor of an exported folder whose bytes differ from their checksum.

    The list is empty if the folder has no checksums. Raises: UserError if a file is a link to outside the folder."""
    path = file_in(folder, CHECKSUMS)
    if path is None:
        return []
    try:
        written: dict[str, str] = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        return [f"{CHECKSUMS} cannot be read ({one_line(error)})"]
    found: dict[str, str] = {}
    for name, file_name in _tensors_in(folder):
        # The file is opened for each tensor, because pages that were read count as this process's memory until the
        # file is closed.
        with safe_open(folder / file_name, framework="pt") as file:
            found[name] = checksum(file.get_tensor(name))
    names = {total: name for name, total in written.items()}
    wrong = [name for name in sorted(written.keys() | found.keys()) if written.get(name) != found.get(name)]
    return [f"{name}: differs from {CHECKSUMS}{belonging_to(names.get(found.get(name, '')))}" for name in wrong]


def _tensors_in(folder: Path) -> Iterator[tuple[str, str]]:
    """The name of each tensor in the folder, and the name of its file."""
    for path in sorted(folder.glob("*.safetensors")):
        file_in(folder, path.name)
        with safe_open(path, framework="pt") as file:
            names = file.keys()
        yield from ((name, path.name) for name in names)


def belonging_to(name: str | None) -> str:
    """A part of a message that names the tensor whose bytes were found, or an empty string if `name` is None."""
    return "" if name is None else f", and contains the bytes of {name}"
