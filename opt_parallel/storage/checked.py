"""JSON objects whose last key is a checksum of all other bytes, so that a single changed bit is detected.

Files may come from an untrusted source, so only regular files up to a size limit are read.
"""

from __future__ import annotations

import json
import re
import stat
import zlib
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt

CHECKSUM = "checksum"
END = re.compile(rb', "checksum": "([0-9a-f]{8})"\}\n?\Z')
LONGEST_END = 40  # Number of bytes that exceeds every match of END.
DEEPEST = 32  # Maximum nesting of lists and objects, so that recursive readers do not overflow the stack.
MOST = 2**16  # Default maximum size of a file in bytes.

# integer types of the JSON fields that readers check
Integer = Annotated[int, Ge(-(2**63)), Lt(2**63)]
Count = Annotated[Integer, Ge(0)]
Size = Annotated[Integer, Ge(1)]


def dump_checked(values: dict[str, Any], ascii_only: bool = True) -> str:
    """`values` as one line of JSON. The last key `checksum` holds the CRC-32 of all bytes before it as eight hex
    digits."""
    text = json.dumps(values, ensure_ascii=ascii_only).removesuffix("}")
    return f'{text}, "{CHECKSUM}": "{zlib.crc32(text.encode()):08x}"}}'


def parse_checked(text: bytes) -> dict[str, Any]:
    """The object that `dump_checked` wrote. A missing checksum is accepted, because earlier versions of this package
    wrote no checksum.

    Raises: ValueError with the reason."""
    try:
        values = json.loads(text.decode(), object_pairs_hook=without_duplicates)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    if values.pop(CHECKSUM, None) is not None:
        end = END.search(text[-LONGEST_END:])
        before = text[: len(text) - len(end[0])] if end else b""
        if end is None or zlib.crc32(before) != int(end[1], 16):
            raise ValueError("it differs from its checksum")
    return values


def read_checked(path: Path, most: int = MOST) -> dict[str, Any]:
    """The object in a file of at most `most` bytes. Raises: OSError; ValueError with the reason, as `parse_checked`."""
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device might never end
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return parse_checked(text)


def is_deep(values: Any) -> bool:
    """Whether lists and objects are nested more than `DEEPEST` levels."""
    level = [values]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in level)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of a JSON object's key-value pairs, for `object_pairs_hook`. Raises: ValueError if a key occurs
    twice."""
    values = dict(pairs)
    if len(values) < len(pairs):  # JSON parsers differ in which of two equal keys they use
        raise ValueError("a key is there twice")
    return values
