"""Reads slices of the arrays in TensorFlow's and Flax's weight files, without reading whole files.

TensorFlow and Flax store the matrix of a linear layer as (in, out), and PyTorch as (out, in). So the ranges of a slice
are swapped, and its values are transposed. HDF5 arrays are refused unless they are contiguous in the file, as HDF5 can
also read values from any other file of the host, and can expand a compressed byte to gigabytes.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opt_parallel.runtime.errors import UserError

Ranges = tuple[slice, ...]
MOST_OBJECTS = 1_000_000  # Maximum number of objects in a Flax file; OPT-175B has 1,600.
# For the last part of a TensorFlow or Flax name: the name in PyTorch, and whether PyTorch stores the transposed matrix.
LEAVES = {
    "kernel": ("weight", True), "embedding": ("weight", False), "embeddings": ("weight", False),
    "scale": ("weight", False), "gamma": ("weight", False), "beta": ("bias", False),
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """The location of an array in a file. The elements are in the `pieces` (first byte, number of elements)."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[tuple[int, int]]
    transposed: bool = False


class _ArrayFile:
    """A weight file whose arrays are memory-mapped."""

    def __init__(self, path: Path, arrays: Iterator[tuple[list[str], _Stored]]) -> None:
        """`arrays` are the name of each array, as a list of parts, and its location in the file."""
        self.path = path
        self._stored: dict[str, _Stored] = {}
        for parts, stored in arrays:
            name, transposed = torch_name(parts)
            if name in self._stored:
                raise ValueError(f"two arrays of the file have the name {name}")
            self._stored[name] = _Stored(stored.shape, stored.dtype, stored.pieces, transposed)
        self.shapes = {name: _transposed(stored.shape, stored.transposed) for name, stored in self._stored.items()}
        self.dtypes = {_torch_dtype(stored.dtype) for stored in self._stored.values()}

    def read(self, name: str, ranges: Ranges) -> Tensor:
        stored = self._stored[name]
        # NumPy has no bfloat16, so the bits of such values are read as integers.
        dtype = np.dtype("int16" if stored.dtype == "bfloat16" else stored.dtype)
        pieces = [np.memmap(self.path, dtype, "r", start, (count,)) for start, count in stored.pieces]
        flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        values = torch.from_numpy(np.array(flat.reshape(stored.shape)[_transposed(ranges, stored.transposed)]))
        if stored.dtype == "bfloat16":
            values = values.view(torch.bfloat16)
        return values.T if stored.transposed else values


class Hdf5File(_ArrayFile):
    """TensorFlow's format."""

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise UserError(f"{path} is TensorFlow's and needs h5py: pip install 'opt-parallel[import]'") from error
        links: dict[str, Any] = {}
        with h5py.File(path, "r") as file:
            file.visititems_links(links.__setitem__)
            arrays = []
            for name, link in links.items():
                if not isinstance(link, h5py.HardLink):
                    raise ValueError(f"{name} is a link")
                if isinstance(found := file[name], h5py.Dataset):
                    arrays.append((name.removesuffix(":0").split("/"), _contiguous(name, found)))
        super().__init__(path, iter(arrays))


def _contiguous(name: str, dataset: Any) -> _Stored:
    """The location of an HDF5 dataset. Raises: ValueError unless the file stores the dataset contiguously."""
    start, dtype = dataset.id.get_offset(), dataset.dtype
    if dtype.kind not in "fiu" or not dtype.isnative:
        raise ValueError(f"{name} contains {dtype}, not numbers in the format of this CPU")
    if start is None or dataset.id.get_storage_size() != math.prod(dataset.shape) * dtype.itemsize:
        raise ValueError(f"the values of {name} are compressed, in another file, or incomplete")
    return _Stored(tuple(dataset.shape), dtype.str, [(start, math.prod(dataset.shape))])


class MsgpackFile(_ArrayFile):
    """A weight file of Flax, in MessagePack's format.

    The file is a tree of maps. The leaves are arrays, stored as extensions of type 1 with (shape, dtype name, bytes).
    An array above 1 GiB is a map of its shape and of flat chunks (see `flax.serialization`). This class parses the tree
    without reading the arrays."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            unpacker = _Unpacker(content)
            tree, end = unpacker.unpack(0)
            if end != len(content) or not isinstance(tree, dict):
                raise ValueError("the file is not one map")
        super().__init__(path, _leaves(tree))


def torch_name(parts: list[str]) -> tuple[str, bool]:
    """The name in PyTorch of a TensorFlow or Flax array, and whether PyTorch stores the transposed matrix.

    The parts of the name before `decoder` are dropped, because they name the class that saved the file."""
    leaf, transposed = LEAVES.get(parts[-1], (parts[-1], False))
    start = parts.index("decoder") if "decoder" in parts else 0
    return ".".join([*parts[start:-1], leaf]), transposed


def _torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype with the name that NumPy or Flax uses, or None if torch has no such dtype."""
    return torch.bfloat16 if name == "bfloat16" else getattr(torch, np.dtype(name).name, None)


def _transposed(sizes: tuple[Any, ...], transposed: bool) -> tuple[Any, ...]:
    return sizes[::-1] if transposed else tuple(sizes)


def _leaves(tree: dict[str, Any], parts: tuple[str, ...] = ()) -> Iterator[tuple[list[str], _Stored]]:
    for key, value in tree.items():
        if isinstance(value, _Stored):
            yield [*parts, key], value
        elif "__msgpack_chunked_array__" in value:
            chunks = [value["chunks"][str(number)] for number in range(len(value["chunks"]))]
            shape = tuple(value["shape"][str(dim)] for dim in range(len(value["shape"])))
            pieces = [piece for chunk in chunks for piece in chunk.pieces]
            if len({chunk.dtype for chunk in chunks}) != 1 or sum(count for _, count in pieces) != math.prod(shape):
                raise ValueError(f"the chunks of {key} do not have its shape")
            yield [*parts, key], _Stored(shape, chunks[0].dtype, pieces)
        else:
            yield from _leaves(value, (*parts, key))


# For the type bytes of MessagePack that precede a length: the kind of object, and the number of bytes of the length.
LENGTHS = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("array", 1), 0xC8: ("array", 2),
    0xC9: ("array", 4), 0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xDC: ("list", 2), 0xDD: ("list", 4),
    0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
# The lowest type byte of each kind of object whose length is in the low bits of the type byte.
SHORT = {0x80: "map", 0x90: "list", 0xA0: "text"}
NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
SIMPLE = {0xC0: None, 0xC2: False, 0xC3: True}


class _Unpacker:
    """Parses MessagePack without reading the values of arrays."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.objects = content, 0

    def unpack(self, at: int) -> tuple[Any, int]:
        """The object that starts at byte `at`, and the offset of its end.

        An array is returned as a `_Stored`, and other bytes as the range of their offsets.

        Raises: ValueError or IndexError if there is no object, and RecursionError if it is nested too deeply."""
        self.objects += 1
        if self.objects > MOST_OBJECTS:
            raise ValueError(f"the file has more than {MOST_OBJECTS:,} objects")
        kind, value, at = self._head(at)
        match kind:
            case "value":
                return value, at
            case "text":
                return self.content[at : at + value].decode(), at + value
            case "bytes":
                return range(at, at + value), at + value
            case "array":
                return self._array(at), at + 1 + value
        items = []
        for _ in range(value * (2 if kind == "map" else 1)):
            item, at = self.unpack(at)
            items.append(item)
        return (dict(zip(items[::2], items[1::2], strict=True)) if kind == "map" else items), at

    def _head(self, at: int) -> tuple[str, Any, int]:
        """The kind of the object at byte `at`, its value or length, and the offset of the following byte."""
        content = self.content
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
            raise ValueError(f"byte {at - 1} has a type that weights do not use")
        low = max(low for low in SHORT if low <= first)
        return SHORT[low], first - low, at

    def _array(self, at: int) -> _Stored:
        """The location of the array in the extension whose type is stored in byte `at`."""
        if self.content[at] != 1:
            raise ValueError(f"extension {self.content[at]} is not an array")
        (shape, dtype, values), _ = self.unpack(at + 1)
        numbers = dtype == "bfloat16" or np.dtype(dtype).kind in "fiu"
        size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        if not numbers or min(shape, default=0) < 0 or len(values) != math.prod(shape) * size:
            raise ValueError("an array does not have its shape")
        return _Stored(tuple(shape), dtype, [(values.start, math.prod(shape))])
