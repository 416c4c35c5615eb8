"""Files of weights as named tensors that can be read in slices: safetensors, PyTorch's, TensorFlow's and Flax's.

A reader has `shapes`, each tensor's by its name in PyTorch, and `read(name, ranges)`. TensorFlow and Flax store a
product's matrix as (in, out), PyTorch as (out, in): their readers turn names and ranges around, and read no more.
Files are mapped anew for each read: pages that were read count as this process's memory as long as their mapping lasts.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from opt_parallel.errors import UserError, one_line
from opt_parallel.hub import INDEX_SUFFIX, WEIGHTS

REMAP = 1 << 27  # bytes of tensors read through one mapping of a PyTorch file
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
Ranges = tuple[slice, ...]
# the last part of a TensorFlow or Flax name, PyTorch's for it, and whether PyTorch stores the transposed matrix
LEAVES = {
    "kernel": ("weight", True), "embedding": ("weight", False), "embeddings": ("weight", False),
    "scale": ("weight", False), "gamma": ("weight", False), "beta": ("bias", False),
}  # fmt: skip


class WeightFile(Protocol):
    """A file of named tensors."""

    shapes: dict[str, tuple[int, ...]]

    def __init__(self, path: Path) -> None: ...

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice of a tensor, in the dtype it is stored in."""


class WeightFiles:
    """All tensors of a folder, in the first format of `WEIGHTS` that is there, in one file or in many."""

    def __init__(self, folder: Path) -> None:
        """Raises: UserError if there are none, a file is missing or damaged."""
        self._files: dict[str, WeightFile] = {}
        for path, open_file in _files_of(folder):
            with reading(path):
                file = open_file(path)
            self._files.update(dict.fromkeys(file.shapes, file))
        self.folder = folder
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice of a tensor. Raises: UserError if its file is damaged."""
        with reading(self.folder, f": {name}"):
            values = self._files[name].read(name, ranges)
        if values.dtype not in DTYPES:
            kind = str(values.dtype).removeprefix("torch.")
            raise UserError(f"{self.folder}: {name} is {kind}, and only {', '.join(DTYPES.values())} are weights here")
        return values


def _files_of(folder: Path) -> Iterator[tuple[Path, type[WeightFile]]]:
    for single, open_file in FORMATS.items():
        index = folder / (single + INDEX_SUFFIX)
        if (folder / single).is_file():
            yield folder / single, open_file
            return
        if index.is_file():
            for name in _named_in(index):
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name} is missing, {index.name} names it: bring a whole copy")
                yield folder / name, open_file
            return
    raise UserError(f"{folder} holds no weights: there is none of {', '.join(WEIGHTS)}, nor one split with an index")


def _named_in(index: Path) -> list[str]:
    """The files that an index names, each once."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weight files ({one_line(error)}): bring a whole copy") from error
    if outside or not files:
        raise UserError(f"{index} names {outside[0] if outside else 'no file'}: files beside it are expected")
    return sorted(files)


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Whatever goes wrong inside is a damaged file: one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # five libraries' own, down to struct's
        raise UserError(f"{path}{what} cannot be read ({one_line(error)}): bring a whole copy") from error


class SafetensorsFile:
    """Safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(self, name: str, ranges: Ranges) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            values = file.get_slice(name)[ranges]
        assert isinstance(values, Tensor)
        return values


class TorchFile:
    """What `torch.save` wrote. Weights alone are unpickled, nothing in the file can run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 is read whole, and kept
        tensors = self.load()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._kept = None if self.mapped else tensors
        self._touched = 0

    def read(self, name: str, ranges: Ranges) -> Tensor:
        tensors = _mapping(self, self._touched // REMAP) if self._kept is None else self._kept
        self._touched += tensors[name].nbytes
        return tensors[name][ranges]

    def load(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():  # it would tell of a strange pickle before it refuses it
                warnings.simplefilter("ignore")
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except Exception as error:
            raise UserError(
                f"{self.path} is no file of weights alone, or damaged, and nothing else is read from a pickle: bring "
                "a whole copy, or convert it to safetensors where you trust it"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{self.path} holds a {type(content).__name__}, not tensors by name")
        return content


@lru_cache(maxsize=1)
def _mapping(file: TorchFile, number: int) -> dict[str, Tensor]:
    """The file's tensors, mapped for the `number`th time, and let go when others are asked for: opening takes longer
    than reading most tensors, and what was read stays in memory until the mapping ends."""
    return file.load()


class Hdf5File:
    """TensorFlow's."""

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise UserError(f"{path} is TensorFlow's and needs h5py: pip install 'opt-parallel[import]'") from error
        self._open = lambda: h5py.File(path)
        self._stored: dict[str, tuple[str, bool]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

        def visit(place: str, found: Any) -> None:
            if isinstance(found, h5py.Dataset):
                name, transposed = torch_name(place.removesuffix(":0").split("/"))
                self._stored[name] = place, transposed
                self.shapes[name] = _turned(found.shape, transposed)

        with self._open() as file:
            file.visititems(visit)

    def read(self, name: str, ranges: Ranges) -> Tensor:
        place, transposed = self._stored[name]
        with self._open() as file:
            values = torch.from_numpy(file[place][_turned(ranges, transposed)])
        return values.T if transposed else values


@dataclass(frozen=True)
class _Stored:
    """Where an array lies: its elements, in order, in one piece or several (first byte, number of elements)."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[tuple[int, int]]
    transposed: bool = False


class MsgpackFile:
    """Flax's: a tree of maps, its leaves extensions of type 1 that hold (shape, dtype name, bytes).

    Arrays above 1 GiB are maps instead, of their shape and of flat chunks. Unpacking would read everything, so the tree
    is walked here and its arrays are left where they are (MessagePack's specification; `flax.serialization`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored: dict[str, _Stored] = {}
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            tree, end = _unpack(content, 0)
            if end != len(content) or not isinstance(tree, dict):
                raise ValueError("not one map")
        for parts, stored in _leaves(tree):
            name, transposed = torch_name(parts)
            self._stored[name] = _Stored(stored.shape, stored.dtype, stored.pieces, transposed)
        self.shapes = {name: _turned(stored.shape, stored.transposed) for name, stored in self._stored.items()}

    def read(self, name: str, ranges: Ranges) -> Tensor:
        stored = self._stored[name]
        # numpy knows no bfloat16: its bits are read as integers
        dtype = np.dtype("int16" if stored.dtype == "bfloat16" else stored.dtype)
        pieces = [np.memmap(self.path, dtype, "r", start, (count,)) for start, count in stored.pieces]
        flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        values = torch.from_numpy(np.array(flat.reshape(stored.shape)[_turned(ranges, stored.transposed)]))
        if stored.dtype == "bfloat16":
            values = values.view(torch.bfloat16)
        return values.T if stored.transposed else values


FORMATS: dict[str, type[WeightFile]] = dict(
    zip(WEIGHTS, (SafetensorsFile, TorchFile, Hdf5File, MsgpackFile), strict=True)
)


def torch_name(parts: list[str]) -> tuple[str, bool]:
    """PyTorch's name of a TensorFlow or Flax one, and whether its matrix is transposed there.

    What stands before the decoder is the class that saved it."""
    leaf, transposed = LEAVES.get(parts[-1], (parts[-1], False))
    start = parts.index("decoder") if "decoder" in parts else 0
    return ".".join([*parts[start:-1], leaf]), transposed


def _turned(sizes: tuple[Any, ...], transposed: bool) -> tuple[Any, ...]:
    return sizes[::-1] if transposed else tuple(sizes)


def _leaves(tree: dict[str, Any], parts: tuple[str, ...] = ()) -> Iterator[tuple[list[str], _Stored]]:
    for key, value in tree.items():
        if isinstance(value, _Stored):
            yield [*parts, key], value
        elif "__msgpack_chunked_array__" in value:
            chunks = [value["chunks"][str(number)] for number in range(len(value["chunks"]))]
            shape = tuple(value["shape"][str(dim)] for dim in range(len(value["shape"])))
            yield [*parts, key], _Stored(shape, chunks[0].dtype, [piece for chunk in chunks for piece in chunk.pieces])
        else:
            yield from _leaves(value, (*parts, key))


# MessagePack's first bytes that a length follows: what it is, and the bytes of the length
LENGTHS = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("array", 1), 0xC8: ("array", 2),
    0xC9: ("array", 4), 0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xDC: ("list", 2), 0xDD: ("list", 4),
    0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
# those whose low bits are the length, by the first of them
SHORT = {0x80: "map", 0x90: "list", 0xA0: "text"}
NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
SIMPLE = {0xC0: None, 0xC2: False, 0xC3: True}


def _unpack(content: mmap.mmap, at: int) -> tuple[Any, int]:
    """The object that begins at byte `at`, and where it ends; of bytes only where they are, of an array a `_Stored`."""
    kind, value, at = _head(content, at)
    match kind:
        case "value":
            return value, at
        case "text":
            return content[at : at + value].decode(), at + value
        case "bytes":
            return range(at, at + value), at + value
        case "array":
            return _array(content, at), at + 1 + value
    items = []
    for _ in range(value * (2 if kind == "map" else 1)):
        item, at = _unpack(content, at)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at


def _head(content: mmap.mmap, at: int) -> tuple[str, Any, int]:
    """What begins at byte `at`: its kind, its value or else its length, and where it goes on."""
    first, at = content[at], at + 1
    if first < 0x80:
        return "value", first, at
    if first in SIMPLE:
        return "value", SIMPLE[first], at
    if first in NUMBERS:
        end = at + struct.calcsize(NUMBERS[first])
        return "value", struct.unpack(NUMBERS[first], content[at:end])[0], end
    if 0xD4 <= first <= 0xD8:
        return "array", 1 << (first - 0xD4), at
    if first in LENGTHS:
        kind, size = LENGTHS[first]
        return kind, int.from_bytes(content[at : at + size], "big"), at + size
    if first >= 0xC0:
        raise ValueError(f"byte {at - 1} begins nothing that such a tree has")
    low = max(low for low in SHORT if low <= first)
    return SHORT[low], first - low, at


def _array(content: mmap.mmap, at: int) -> _Stored:
    """The extension whose type stands at byte `at`."""
    if content[at] != 1:
        raise ValueError(f"extension {content[at]} is no array")
    (shape, dtype, place), _ = _unpack(content, at + 1)
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    if len(place) != math.prod(shape) * size:
        raise ValueError("an array is not of its shape")
    return _Stored(tuple(shape), dtype, [(place.start, math.prod(shape))])
