"""Files of JSON lines, each line with a checksum, to which a run appends (`metrics.jsonl`, `samples.jsonl`)."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_parallel.runtime.log import say
from opt_parallel.storage.atomic import free_name, write_bytes
from opt_parallel.storage.checked import CHECKSUM, parse_checked

METRICS = "metrics.jsonl"
Row = dict[str, Any]


def read_lines(path: Path) -> Iterator[tuple[bytes, Row | None]]:
    """Each line of a regular file with its parsed row, or None if the line is damaged. An incomplete last line is
    skipped, because a run may still be writing the line or may have been killed. Raises: OSError."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n") or CHECKSUM.encode() in line:
                yield line.rstrip(b"\n") + b"\n", _row(line)


def read_rows(path: Path) -> tuple[list[Row], list[int]]:
    """The rows of a file and the numbers of its damaged lines, counted from 1. Both lists are empty if the file does
    not exist. Raises: OSError."""
    rows: list[Row] = []
    damaged: list[int] = []
    for number, (_, row) in enumerate(read_lines(path) if path.is_file() else (), start=1):
        if row is None:
            damaged.append(number)
        else:
            rows.append(row)
    return rows, damaged


def rows_of(path: Path) -> list[Row]:
    """The rows of a file. A warning gives the numbers of damaged lines. Raises: OSError."""
    rows, damaged = read_rows(path)
    if damaged:
        say(f"warning: {describe_damaged(path, damaged)} and not used")
    return rows


def keep_rows(path: Path, last_step: int) -> None:
    """Delete the rows of steps after `last_step`, atomically. If lines are damaged, keep a copy of the original file
    under another name, with a warning. Raises: OSError."""
    lines = list(read_lines(path)) if last_step and path.is_file() else []
    damaged = [number for number, (_, row) in enumerate(lines, start=1) if row is None]
    if damaged:
        copy = free_name(path, "damaged")
        shutil.copyfile(path, copy)
        say(f"warning: {describe_damaged(path, damaged)} and removed; the original file is {copy.name}")
    kept = b"".join(line for line, row in lines if row is not None and row["step"] <= last_step)
    if path.is_file() and not damaged and _begins_with(path, kept):
        os.truncate(path, len(kept))  # truncating needs no free disk space
    elif path.exists():
        write_bytes(path, kept)


def _begins_with(path: Path, content: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(content)) == content


def describe_damaged(path: Path, damaged: list[int]) -> str:
    """The numbers of damaged lines as the start of a message."""
    one = len(damaged) == 1
    more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
    numbers = ", ".join(map(str, damaged[:10]))
    return f"{path}, {'line' if one else 'lines'} {numbers}{more} {'is' if one else 'are'} damaged"


def _row(line: bytes) -> Row | None:
    try:
        row = parse_checked(line.rstrip(b"\n"))
    except ValueError:
        return None
    text = isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)
    loss = row.get("loss", "")  # null if the loss was not finite
    number = loss is None or (type(loss) in (int, float) and math.isfinite(loss))
    measured = isinstance(row.get("kind"), str) and number
    return row if type(row.get("step")) is int and (text or measured) else None
