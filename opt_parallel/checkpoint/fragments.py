"""The fragments of a checkpoint: the elements of the full tensors that each file contains (docs/checkpoint-format.md).

`fragments.safetensors` has one table for the file of each rank. A row of a table is a fragment, with four integers: the
number of the tensor among the sorted names, the part of the tensor, and the first element and the number of elements in
the flattened part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import safetensors
from safetensors.numpy import save

from opt_parallel.checkpoint.manifest import LARGEST, MANIFEST, Damaged, wrong_size
from opt_parallel.config.optimizer import OptimizerName, StateDtype
from opt_parallel.optim import OPTIMIZERS, saved_optimizer
from opt_parallel.parallel.shard import Constant, Shard
from opt_parallel.runtime.errors import UserError

TABLES = "fragments.safetensors"
VALUE = 4  # bytes of a float32
MOST = 2**60  # Maximum number of elements of all tensors, so that no address exceeds an int64.

Row = Sequence[int]  # tensor, part, start, count


class Fragments:
    """All fragments of a checkpoint, which contain each element of each tensor exactly once.

    The parts of all tensors, flattened and in a fixed order, follow each other in one range of addresses. A fragment is
    an interval of addresses. The intervals are sorted, so bisection finds the fragments of any elements."""

    def __init__(self, folder: Path, manifest: dict[str, Any], kinds: set[str]) -> None:
        """Read and check the tables of a checkpoint.

        Raises: Damaged unless each element is in exactly one fragment, and each fragment has all `kinds` of tensors.
        Fragments must not exceed the size of their file, so a tensor cannot be larger than the data on the disk."""
        self.folder, self.kinds, self.tensors = folder, kinds, manifest["tensors"]
        self.names = sorted(self.tensors)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self._measure_tensors()
        if manifest["format"] == 1:
            self._check_format_1(manifest["files"])
        tables = read_tables(folder, manifest)
        self.files = list(tables)
        found = np.zeros(len(self.names), np.int64)  # elements of each tensor, without padding
        for file, table in tables.items():
            if file not in manifest["files"]:
                raise self._changed(f"{file!r} is not among the files")
            self._check_table(file, table, manifest["files"][file]["bytes"])
            tensor, part, start, count = table.T
            found[tensor] += self._real_before(tensor, part, start + count) - self._real_before(tensor, part, start)
        none = np.empty(0, np.int64)
        begin = np.concatenate([none, *(self._addresses(*table.T[:3]) for table in tables.values())])
        end = begin + np.concatenate([none, *(table[:, 3] for table in tables.values())])
        file_of = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables.values()])
        order = np.argsort(begin)
        self.begin, self.end, self.file_of = begin[order], end[order], file_of[order]
        self._check_elements(found)

    def holding(self, name: str, part: int, first: int, last: int) -> Iterator[tuple[str, int, int]]:
        """The fragments with any of the elements `first` to `last` of a flattened part of a tensor. Each fragment is
        its file, its first element, and its number of elements."""
        base = int(self._addresses(self.numbers[name], part, 0))
        rows = slice(self.end.searchsorted(base + first, "right"), self.begin.searchsorted(base + last, "left"))
        fragments = zip(*(each[rows].tolist() for each in (self.file_of, self.begin, self.end)), strict=True)
        for file, begin, end in fragments:
            yield self.files[file], begin - base, end - begin

    def sizes_in(self, file: str) -> dict[str, int]:
        """The number of bytes of each tensor that a file must contain, by the tensor's key."""
        rows = self.file_of == self.files.index(file)
        counts = (self.end[rows] - self.begin[rows]).tolist()
        names = [self._name_at(address) for address in self.begin[rows]]
        return {
            f"{kind}/{name}": VALUE * count for name, count in zip(names, counts, strict=True) for kind in self.kinds
        }

    def _measure_tensors(self) -> None:
        """Set arrays with a value of each tensor: its first address, its number of parts, the elements of a part, its
        size along `dim`, the size of a part along `dim`, and the elements of a row, which is an index of `dim`."""
        values, address = [], 0
        for name in self.names:
            tensor = self.tensors[name]
            dim = tensor["dim"]
            if dim >= len(tensor["shape"]):
                raise self._changed(f"{name} has no dim {dim}")
            local = shard_of_part(tensor, 0).local_shape
            size, row = math.prod(local), math.prod(local[dim + 1 :])
            values.append((address, tensor["parts"], size, tensor["shape"][dim], local[dim], row))
            address += tensor["parts"] * size
        if address >= MOST:
            raise self._changed("the tensors are too large")
        self.first, self.parts, self.size, self.full, self.split, self.row = np.array(values, np.int64).reshape(-1, 6).T

    def _addresses(self, tensor: Any, part: Any, start: Any) -> Any:
        return self.first[tensor] + part * self.size[tensor] + start

    def _real_before(self, tensor: np.ndarray, part: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The number of the first `end` elements of flattened parts of tensors that are not padding."""
        split, row = self.split[tensor], self.row[tensor]
        real, padded = np.clip(self.full[tensor] - part * split, 0, split) * row, split * row
        before: np.ndarray = end // padded * real + np.minimum(end % padded, real)
        return before

    def _check_format_1(self, files: dict[str, Any]) -> None:
        for file, written in files.items():
            for fragment in written["fragments"]:
                name, tensor = fragment["name"], self.tensors.get(fragment["name"])
                if tensor is None or fragment["parts"] != tensor["parts"]:
                    raise self._changed(f"{file} has a fragment of {name} that is not of one of its parts")
                if sorted(fragment["kinds"]) != sorted(self.kinds):
                    raise self._changed(f"{file} has a fragment of {name} without {', '.join(sorted(self.kinds))}")

    def _check_table(self, file: str, table: np.ndarray, size: int) -> None:
        """Raise Damaged unless each row is within a part of another tensor, and all fit into a file of `size` bytes."""
        tensor, part, start, count = table.T
        if not ((tensor >= 0) & (tensor < len(self.names))).all():
            raise self._changed(f"{file} has a fragment of an unknown tensor")
        if (np.bincount(tensor) > 1).any():
            raise self._changed(f"{file} has two fragments of a tensor")
        inside = (part >= 0) & (part < self.parts[tensor]) & (start >= 0) & (count >= 1)
        inside &= count <= self.size[tensor] - start
        if not inside.all():
            number, *where = table[inside.argmin()].tolist()
            limits = f"{self.parts[number]} parts of {self.size[number]:,} elements"
            what = "{2} elements from {1} on of part {0}".format(*where)
            raise self._changed(f"{file} has {what} of {self.names[number]}, which has {limits}")
        if VALUE * len(self.kinds) * int(count.sum()) > size:
            raise self._changed(f"{file} is smaller than its fragments")

    def _check_elements(self, found: np.ndarray) -> None:
        """Raise Damaged unless no element is in two fragments, and all elements are `found`.

        Elements of padding are not counted, because a fragment may include them or not."""
        twice = self.begin[1:] < self.end[:-1]
        if twice.any():
            raise self._changed(f"{self._name_at(self.begin[twice.argmax()])} has elements that are in two fragments")
        for name, elements in zip(self.names, found.tolist(), strict=True):
            wanted = math.prod(self.tensors[name]["shape"])
            if elements != wanted:
                raise self._changed(f"{name} has {wanted:,} elements, of which {elements:,} are in the files")

    def _name_at(self, address: int) -> str:
        return self.names[int(self.first.searchsorted(address, "right")) - 1]

    def _changed(self, fault: str) -> Damaged:
        return Damaged(self.folder, f"{MANIFEST} was changed after it was written ({fault})")


def write_tables(path: Path, tables: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Write the tables of a checkpoint, by the name of the file, and return the entry for the manifest."""
    content = save({file: np.array(rows, np.int64).reshape(-1, 4) for file, rows in tables.items()})
    path.write_bytes(content)
    return {"bytes": len(content), "crc32": f"{crc32(content):08x}"}


def read_tables(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """The table (n, 4) of each file with fragments. Raises: Damaged if the file of the tables is damaged."""
    if manifest["format"] == 1:  # the fragments are in the manifest
        numbers = {name: number for number, name in enumerate(sorted(manifest["tensors"]))}
        return {
            file: np.array([_row(numbers, fragment) for fragment in written["fragments"]], np.int64)
            for file, written in manifest["files"].items()
            if written["fragments"]
        }
    written = manifest["files"].get(TABLES)
    if written is None or written["bytes"] > LARGEST:
        raise Damaged(folder, f"{MANIFEST} lists no {TABLES} of at most {LARGEST:,} bytes")
    wrong = wrong_size(folder, TABLES, written)
    if wrong:
        raise Damaged(folder, wrong)
    try:
        content = (folder / TABLES).read_bytes()
        if f"{crc32(content):08x}" != written["crc32"]:
            raise Damaged(folder, f"{TABLES} differs from its checksum")
        stored = dict(safetensors.deserialize(content))
    except (OSError, safetensors.SafetensorError) as error:
        raise Damaged(folder, f"{TABLES} cannot be read ({error})") from error
    for file, table in stored.items():
        if table["dtype"] != "I64" or len(table["shape"]) != 2 or table["shape"][1] != 4:
            raise Damaged(folder, f"{TABLES} cannot be read ({file!r} is not a table of four columns)")
    return {file: np.frombuffer(table["data"], "<i8").reshape(-1, 4) for file, table in stored.items()}


def _row(numbers: dict[str, int], fragment: dict[str, Any]) -> Row:
    return numbers.get(fragment["name"], -1), fragment["part"], fragment["start"], fragment["count"]


def shard_of_part(tensor: dict[str, Any], part: int) -> Shard:
    """The `Shard` of part number `part` of a tensor that a manifest describes."""
    return Shard(tuple(tensor["shape"]), tensor["dim"], part, tensor["parts"], Constant(0), False)


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
    return {"weights", *OPTIMIZERS[OptimizerName(name), StateDtype.fp32].moments}
