"""Reads slices of named tensors from files of safetensors, PyTorch, TensorFlow and Flax.

A reader has `shapes`, by the tensors' names in PyTorch, and `read(name, ranges)`. Files are mapped again for each read:
pages that were read count as this process's memory as long as their mapping lasts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, reduce
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from opt_parallel.huggingface.arrays import Hdf5File, MsgpackFile, Ranges
from opt_parallel.huggingface.hub import INDEX_SUFFIX, WEIGHTS
from opt_parallel.huggingface.pickled import ZIP, check_pickled
from opt_parallel.runtime.errors import UserError, one_line, out_of_memory
from opt_parallel.runtime.machine import is_out_of_memory
from opt_parallel.storage.foreign import file_in, read_json

REMAP = 1 << 27  # bytes of tensors read through one mapping of a PyTorch file
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
MOST_HEADER = 1 << 24  # bytes of a safetensors header; OPT-175B's headers have 0.2 MB
LONGEST_NAME, MOST_DIMS = 500, 8


class WeightFile(Protocol):
    """A file of named tensors."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: set[torch.dtype | None]  # of its tensors; None for a dtype that torch does not have

    def __init__(self, path: Path) -> None: ...

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice of a tensor, in its stored dtype."""


class WeightFiles:
    """All tensors of a folder, in the first format of `WEIGHTS` that it has, in one file or in several."""

    def __init__(self, folder: Path, formats: tuple[str, ...] = WEIGHTS) -> None:
        """`formats`: the formats of `WEIGHTS` to look for. Raises: UserError if there are no weights, or a file is
        missing, damaged or not in the folder."""
        self._files: dict[str, WeightFile] = {}
        for path, open_file in _files_of(folder, formats):
            with reading(path):
                file = open_file(path)
                _check_names(file.shapes)
            for name in file.shapes.keys() & self._files.keys():
                raise UserError(f"{path}: {name} is also in another file: use a complete copy")
            self._files.update(dict.fromkeys(file.shapes, file))
        self.folder = folder
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        dtypes = {dtype for file in self._files.values() for dtype in file.dtypes if dtype in DTYPES}
        self.dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32  # represents all their values

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice of a tensor. Raises: UserError if its file is damaged."""
        with reading(self.folder, f": {name}"):
            values = self._files[name].read(name, ranges)
        if values.dtype not in DTYPES:
            kind = str(values.dtype).removeprefix("torch.")
            raise UserError(f"{self.folder}: {name} is {kind}, not one of {', '.join(DTYPES.values())}")
        return values


def _check_names(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a name that would not fit into one line of a message."""
    for name, shape in shapes.items():
        if len(name) > LONGEST_NAME or not name.isprintable() or len(shape) > MOST_DIMS:
            raise ValueError(f"{name!r:.80} of {len(shape)} dimensions is not a tensor's name")


def _files_of(folder: Path, formats: tuple[str, ...]) -> Iterator[tuple[Path, type[WeightFile]]]:
    for single in formats:
        open_file = FORMATS[single]
        if path := file_in(folder, single):
            yield path, open_file
            return
        if index := file_in(folder, single + INDEX_SUFFIX):
            for name in _named_in(index):
                path = file_in(folder, name)
                if path is None:
                    raise UserError(f"{folder / name} is missing, and {index.name} names it: use a complete copy")
                yield path, open_file
            return
    raise UserError(f"{folder} holds no weights: it has none of {', '.join(formats)}, nor an index of split weights")


def _named_in(index: Path) -> list[str]:
    """The files that an index names, each once."""
    try:
        files = set(read_json(index)["weight_map"].values())
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weight files ({one_line(error)}): use a complete copy") from error
    if outside or not files:
        named = f"{outside[0]!r:.200}" if outside else "no file"
        raise UserError(f"{index} names {named}: it must name files beside it")
    return sorted(files)


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Turn any error within the context into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of five libraries
        if is_out_of_memory(error):
            raise UserError(f"{path}{what}: {out_of_memory(error)}") from error
        raise UserError(f"{path}{what} cannot be read ({one_line(error):.500}): use a complete copy") from error


class SafetensorsFile:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MOST_HEADER:
                raise ValueError(f"its header is larger than {MOST_HEADER:,} bytes")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            self.shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            self.dtypes = {SAFETENSORS.get(each.get_dtype()) for each in slices.values()}

    def read(self, name: str, ranges: Ranges) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            values = file.get_slice(name)[ranges]
        assert isinstance(values, Tensor)
        return values


class TorchFile:
    """A file of `torch.save`. Only tensors are unpickled; no code in the file runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.mapped = file.read(len(ZIP)) == ZIP  # files before torch 1.6 cannot be mapped: read at once, and kept
        with self._only_weights():
            check_pickled(path)
        tensors = self.load()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes: set[torch.dtype | None] = {tensor.dtype for tensor in tensors.values()}
        self._kept = None if self.mapped else tensors
        self._touched = 0

    def read(self, name: str, ranges: Ranges) -> Tensor:
        tensors = _mapping(self, self._touched // REMAP) if self._kept is None else self._kept
        self._touched += tensors[name].nbytes
        return tensors[name][ranges]

    def load(self) -> dict[str, Tensor]:
        with self._only_weights(), warnings.catch_warnings():  # torch warns of an unusual pickle before it refuses it
            warnings.simplefilter("ignore")
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{self.path} holds a {type(content).__name__}, not tensors by name")
        return content

    @contextmanager
    def _only_weights(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise  # not the file's fault
            raise UserError(
                f"{self.path} is damaged or holds more than weights, and only weights are read from a pickle "
                f"({one_line(error):.200}): use a complete copy, or convert it to safetensors if you trust it"
            ) from error


@lru_cache(maxsize=1)
def _mapping(file: TorchFile, number: int) -> dict[str, Tensor]:
    """The file's tensors, mapped for the `number`th time. The cache of size 1 drops the mapping when another one is
    made. One mapping serves many reads, since opening takes longer than reading most tensors; but not all, since pages
    that were read stay in memory until the mapping ends."""
    return file.load()


FORMATS: dict[str, type[WeightFile]] = dict(
    zip(WEIGHTS, (SafetensorsFile, TorchFile, Hdf5File, MsgpackFile), strict=True)
)
