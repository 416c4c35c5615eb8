"""Reads slices of named tensors from weight files in the formats of safetensors, PyTorch, TensorFlow and Flax.

A reader has `shapes`, by the names of the tensors in PyTorch, and a method `read(name, ranges)`. Files are
memory-mapped again for each read, because pages that were read count as this process's memory until the file is
unmapped.
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

REMAP = 1 << 27  # bytes of tensors that are read before a PyTorch file is memory-mapped again
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
MOST_HEADER = 1 << 24  # maximum bytes of a safetensors header; the headers of OPT-175B have 0.2 MB
LONGEST_NAME, MOST_DIMS = 500, 8


class WeightFile(Protocol):
    """A weight file with named tensors."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: set[torch.dtype | None]  # the dtypes of the tensors, with None for a dtype that torch does not have

    def __init__(self, path: Path) -> None: ...

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """The elements `ranges` of the tensor `name`, in the dtype of the file."""


class WeightFiles:
    """The tensors in the weight files of a folder. If the folder has files of several formats, one format is read."""

    def __init__(self, folder: Path, formats: tuple[str, ...] = WEIGHTS) -> None:
        """Open the weight files in one of the `formats` in `folder`.

        Raises: UserError if the folder has no weights, or if a file is missing, damaged or outside the folder."""
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
        self.dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32  # represents all values exactly

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """The elements `ranges` of the tensor `name`. Raises: UserError if the tensor's file is damaged."""
        with reading(self.folder, f": {name}"):
            values = self._files[name].read(name, ranges)
        if values.dtype not in DTYPES:
            kind = str(values.dtype).removeprefix("torch.")
            raise UserError(f"{self.folder}: {name} is {kind}, not one of {', '.join(DTYPES.values())}")
        return values


def _check_names(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError if a name is too long for a line of a message, or a tensor has too many dimensions."""
    for name, shape in shapes.items():
        if len(name) > LONGEST_NAME or not name.isprintable() or len(shape) > MOST_DIMS:
            raise ValueError(f"{name!r:.80} with {len(shape)} dimensions is not a tensor of a network")


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
                    raise UserError(f"{folder / name} is missing, but {index.name} names it: use a complete copy")
                yield path, open_file
            return
    raise UserError(f"{folder} contains no weights: it has none of {', '.join(formats)}, and no index of split weights")


def _named_in(index: Path) -> list[str]:
    """The names of the weight files that an index lists, without repetitions."""
    try:
        files = set(read_json(index)["weight_map"].values())
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weight files ({one_line(error)}): use a complete copy") from error
    if outside or not files:
        named = f"{outside[0]!r:.200}" if outside else "no file"
        raise UserError(f"{index} names {named}: an index must name files in its own folder")
    return sorted(files)


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """A context that turns any error into a UserError with the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # five libraries raise errors of different types
        if is_out_of_memory(error):
            raise UserError(f"{path}{what}: {out_of_memory(error)}") from error
        raise UserError(f"{path}{what} cannot be read ({one_line(error):.500}): use a complete copy") from error


class SafetensorsFile:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MOST_HEADER:
                raise ValueError(f"the header is larger than {MOST_HEADER:,} bytes")
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
    """A file that `torch.save` wrote. Only tensors are unpickled, and no code in the file is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.mapped = file.read(len(ZIP)) == ZIP  # a file from before torch 1.6 cannot be mapped, and is read whole
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
        with self._only_weights(), warnings.catch_warnings():  # torch warns of unusual pickles before it raises errors
            warnings.simplefilter("ignore")
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{self.path} contains a {type(content).__name__}, not a dict of tensors")
        return content

    @contextmanager
    def _only_weights(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise  # the file is not the cause
            raise UserError(
                f"{self.path} is damaged or contains more than weights, and only weights are read from a pickle "
                f"({one_line(error):.200}): use a complete copy, or convert the file to safetensors if you trust it"
            ) from error


@lru_cache(maxsize=1)
def _mapping(file: TorchFile, number: int) -> dict[str, Tensor]:
    """The tensors of a file, which is memory-mapped for the `number`th time.

    A cache of size 1 keeps the last mapping for further reads, because opening a file takes longer than reading most
    tensors. A new `number` replaces the mapping, because pages that were read stay in memory until then."""
    return file.load()


FORMATS: dict[str, type[WeightFile]] = dict(
    zip(WEIGHTS, (SafetensorsFile, TorchFile, Hdf5File, MsgpackFile), strict=True)
)
