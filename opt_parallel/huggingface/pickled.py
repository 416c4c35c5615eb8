"""Checks a PyTorch `.bin` file before torch opens it. The file may contain only named tensors of plausible sizes.

`torch.load(weights_only=True)` runs no code of the file, but it builds any object that the file describes. For example,
a key of nested tuples takes forever to hash, a tensor with one stored value may claim to have 10¹⁸ elements, and a
compressed record may expand to any size.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

ZIP = b"PK\x03\x04"  # The first bytes of a file in torch's present format.
MOST_PICKLED = 1 << 20  # Maximum bytes of all names, shapes and offsets; OPT-175B has 0.3 MB.
ITEM_BYTES = {
    "DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
# The opcodes that `torch.save` writes for a dict of tensors, in its present format and in its format before torch 1.6.
OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.SETITEM, pickle.SETITEMS,
    pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT,
    pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.BINPERSID, pickle.BINGET,
    pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT,
)  # fmt: skip


def check_pickled(path: Path) -> None:
    """Raise an error unless torch can open `path` safely, without building an object that is larger than the file.

    The error is a ValueError or an error of a library."""
    with open(path, "rb") as file:
        if file.read(len(ZIP)) == ZIP:
            _check_zip(file, path.stat().st_size)
        else:
            file.seek(0)
            start = io.BytesIO(file.read(MOST_PICKLED))
            for _ in range(3):  # skips a magic number, the version of the protocol, and a description of the host
                _Inert(start).load()
            unpickler = _Inert(start)
            _require(type(unpickler.load()) is _TextDict, "the content is not a dict")
            _require(unpickler.stored_bytes() <= path.stat().st_size, "the tensors are larger than the file")


def _check_zip(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        _require(all(each.compress_type == zipfile.ZIP_STORED for each in records.values()), "the file is compressed")
        _require(sum(record.file_size for record in records.values()) <= size, "the records are larger than the file")
        (name,) = [name for name in records if name.endswith("/data.pkl")]
        _require(records[name].file_size <= MOST_PICKLED, f"{name} is larger than {MOST_PICKLED} bytes")
        unpickler = _Inert(io.BytesIO(archive.read(name)))
        _require(type(unpickler.load()) is _TextDict, "the content is not a dict")
        for key, storage in unpickler.storages.items():
            record = records[f"{name.removesuffix('data.pkl')}data/{key}"]
            _require(record.file_size >= storage.count * storage.item, f"{record.filename} ends early")


@dataclass(frozen=True)
class _Storage:
    """The size of a storage, which contains the values of tensors: `count` elements of `item` bytes each."""

    count: int
    item: int


class _TextDict(dict):
    """A dict whose keys must be text, because hashing a key of another type may take forever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        _require(type(key) is str, "a key of a dict is not text")
        super().__setitem__(key, value)


class _Inert(pickle._Unpickler):
    """Reads a pickle without building objects other than numbers, text, tuples, lists and dicts."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def stored_bytes(self) -> int:
        """The number of bytes of all storages, which contain the values of the tensors."""
        return sum(storage.count * storage.item for storage in self.storages.values())

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in ITEM_BYTES:
            return ITEM_BYTES[name]
        _require((module, name) in CALLED, f"the file uses {module!r:.80} {name!r:.80}")
        return CALLED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, item, key, _, count = pid[:5]
        known = kind == "storage" and type(key) is str and type(item) is type(count) is int and count >= 0
        _require(known, "it is not a tensor")
        return self.storages.setdefault(key, _Storage(count, item))


def _no_items() -> _TextDict:
    return _TextDict()


def _empty_dict(unpickler: Any) -> None:
    unpickler.append(_TextDict())


def _build(unpickler: Any) -> None:
    """Ignore the attributes of an OrderedDict."""
    unpickler.stack.pop()
    _require(type(unpickler.stack[-1]) is _TextDict, "the file contains more than tensors")


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> None:
    """Raise ValueError if the tensor has more elements than its storage, or if its last element is outside."""
    numbers = (offset, *size, *stride)
    known = len(size) == len(stride) and all(type(number) is int and number >= 0 for number in numbers)
    _require(known, "it is not a tensor")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    elements = math.prod(size)
    fits = elements == 0 or (last < storage.count and elements <= storage.count)
    _require(fits, "a tensor is larger than its storage")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _no_items,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
}
_Inert.dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPCODES}
_Inert.dispatch |= {pickle.EMPTY_DICT[0]: _empty_dict, pickle.BUILD[0]: _build}
