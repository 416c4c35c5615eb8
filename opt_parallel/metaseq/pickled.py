"""Reads a pickle without building any object of a class that it names: nothing is imported, and no code is called.

A pickle is a program for a small stack machine. This module runs the program's instructions for numbers, text, tuples,
lists and dicts. The result of a call is an `Inert` object that keeps the arguments, except for the few functions with
which torch describes a tensor. A tensor becomes a `Located`, which says where its values are.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Maximum bytes of a pickle. One of OPT-175B has 0.2 MB, and a training run's state may contain cached documents.
MOST_BYTES = 1 << 26
MOST_STEPS = 2_000_000  # Maximum number of instructions; a pickle of OPT-175B has 20,000.
MOST_DIMS, MOST_ELEMENTS = 8, 1 << 48  # of a tensor
DTYPES = {
    "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
ITEM_BYTES = {
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A class or function that the pickle names. It is not imported."""

    module: str
    name: str


class Inert:
    """An object of a class that the pickle names: the arguments of the call, and the state that was set."""

    def __init__(self, made_by: object, arguments: object) -> None:
        self.made_by, self.arguments = made_by, arguments
        self.state: object = None


@dataclass(frozen=True)
class Storage:
    """A storage, which holds the values of tensors: `count` elements of `dtype` in the record `key` of the file."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Located:
    """A tensor in a storage. `offset` and `stride` are numbers of elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(content: bytes) -> object:
    """The object in a pickle. Raises: ValueError, or another error of the unpickler, if the pickle is malformed or has
    too many instructions."""
    return _Machine(io.BytesIO(content)).load()


def mapping(value: object) -> dict[Any, object]:
    """The items of a dict, or the attributes of an inert object such as `argparse.Namespace` or omegaconf's
    DictConfig. Other values have no items."""
    value = plain(value)
    if isinstance(value, dict):
        return value
    if isinstance(value, Inert) and isinstance(value.state, dict):
        content = value.state.get("_content")
        return content if isinstance(content, dict) else value.state
    return {}


def plain(value: object) -> object:
    """The value of one of omegaconf's nodes, which wrap each value of a DictConfig. Other values are unchanged."""
    for _ in range(8):
        if not (isinstance(value, Inert) and isinstance(value.state, dict) and "_val" in value.state):
            break
        value = value.state["_val"]
    return value


def item(value: object, *path: str) -> object:
    """The value at a path of keys in nested dicts, namespaces or DictConfigs, or None if a key is missing."""
    for key in path:
        value = mapping(value).get(key)
    return plain(value)


class _Dict(dict):
    """A dict that ignores items whose key is not simple, because hashing nested tuples may take forever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) in (str, int, float, bool, bytes, type(None)):
            super().__setitem__(key, value)


class _Machine(pickle._Unpickler):
    """Runs the instructions of a pickle."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.read, self.readline, self.readinto = file.read, file.readline, file.readinto
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append, self.proto = self.stack.append, 0

    def load(self) -> Any:
        """The object that the instructions build. The base class would not count them, and reads more slowly."""
        dispatch: dict[int, Callable[[Any], None]] = _Machine.dispatch
        for _ in range(MOST_STEPS):
            code = self.read(1)
            if code == pickle.STOP:
                return self.stack.pop()
            dispatch[code[0]](self)
        raise ValueError(f"the pickle has more than {MOST_STEPS:,} instructions")

    def find_class(self, module: str, name: str) -> Any:
        return Named(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            raise ValueError("the pickle refers to something that is not a storage")
        _, kind, key, _, count = pid[:5]
        dtype = DTYPES.get(kind.name) if isinstance(kind, Named) and kind.module == "torch" else None
        if dtype is None or type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("the pickle describes a storage of an unknown kind")
        return Storage(key, dtype, count)


def _empty_dict(machine: Any) -> None:
    machine.append(_Dict())


def _called(machine: Any) -> None:
    arguments = machine.stack.pop()
    called = machine.stack.pop()
    machine.append(_result(called, arguments))


def _called_with_names(machine: Any) -> None:
    machine.stack.pop()  # the named arguments
    _called(machine)


def _build(machine: Any) -> None:
    state, built = machine.stack.pop(), machine.stack[-1]
    if isinstance(built, Inert):
        built.state = state


def _append(machine: Any) -> None:
    value, into = machine.stack.pop(), machine.stack[-1]
    if type(into) is list:
        into.append(value)


def _appends(machine: Any) -> None:
    values = machine.pop_mark()
    if type(machine.stack[-1]) is list:
        machine.stack[-1].extend(values)


def _set_item(machine: Any) -> None:
    value, key, into = machine.stack.pop(), machine.stack.pop(), machine.stack[-1]
    if type(into) is _Dict:
        into[key] = value


def _set_items(machine: Any) -> None:
    values = machine.pop_mark()
    if type(machine.stack[-1]) is _Dict:
        for key, value in zip(values[::2], values[1::2], strict=True):
            machine.stack[-1][key] = value


def _result(called: object, arguments: object) -> object:
    """The result of a call that the pickle asks for."""
    function = CALLED.get((called.module, called.name)) if isinstance(called, Named) else None
    if function is None or type(arguments) is not tuple:
        return Inert(called, arguments)
    return function(*arguments)


def _tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> Located:
    """The tensor, if all its elements are in its storage. Raises: ValueError."""
    shape, stride = tuple(whole_numbers(shape)), tuple(whole_numbers(stride))
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0 or len(shape) != len(stride):
        raise ValueError("the pickle describes a tensor that has no storage")
    last = offset + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    elements = math.prod(shape)
    if elements and (last >= storage.count or elements > storage.count):
        raise ValueError("a tensor is larger than its storage")
    return Located(storage, offset, shape, stride)


def whole_numbers(numbers: object) -> list[int]:
    """The sizes in a shape. Raises: ValueError if they are not the sizes of a tensor of a network."""
    if not isinstance(numbers, tuple | list) or len(numbers) > MOST_DIMS:
        raise ValueError("the shape of a tensor is not a short list of numbers")
    for each in numbers:
        if type(each) is not int or not 0 <= each <= MOST_ELEMENTS:
            raise ValueError("the shape of a tensor has a size that is not possible")
    return list(numbers)


CALLED: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): lambda *_: _Dict(),
    ("collections", "defaultdict"): lambda *_: _Dict(),
    ("torch", "Size"): lambda numbers=(): tuple(whole_numbers(numbers)),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
}
# The instructions of protocol 2, which torch.save writes, and those of later protocols that hold plain values.
PLAIN = (
    pickle.PROTO, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.LONG, pickle.BININT, pickle.BININT1, pickle.BININT2,
    pickle.LONG1, pickle.LONG4, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8,
    pickle.SHORT_BINSTRING, pickle.BINSTRING, pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8, pickle.TUPLE,
    pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST, pickle.GLOBAL,
    pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET,
    pickle.BINGET, pickle.LONG_BINGET,
)  # fmt: skip
_Machine.dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in PLAIN}
_Machine.dispatch |= {
    pickle.EMPTY_DICT[0]: _empty_dict, pickle.REDUCE[0]: _called,
    pickle.NEWOBJ[0]: _called, pickle.NEWOBJ_EX[0]: _called_with_names,
    pickle.BUILD[0]: _build, pickle.APPEND[0]: _append, pickle.APPENDS[0]: _appends,
    pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items,
}  # fmt: skip
