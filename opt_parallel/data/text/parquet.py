"""Reads records from parquet files, a few rows at a time. Class numbers become class names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opt_parallel.config.model import require
from opt_parallel.data.text.records import BadRecord, Item, Record
from opt_parallel.data.text.unpacking import Unbelievable, believe, unbelievable
from opt_parallel.runtime.errors import UserError, one_line

ROWS_READ = 256  # Number of rows that are read at a time.
ClassNames = Mapping[str, list[str]]  # The names of the classes in each column, in the order of their numbers.


def row_groups(path: Path, where: str, size: int) -> list[tuple[int, int, int]]:
    """Ranges of row groups of about `size` bytes, each as (first, last + 1, number of bytes). Raises: UserError."""
    with _opened(path, where) as file:
        metadata = file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = [group.total_byte_size for group in groups]
        rows = sum(group.num_rows for group in groups)  # the file states this number twice, without a checksum
        require(
            rows == metadata.num_rows,
            f"{where} is damaged, because it states {rows:,} and {metadata.num_rows:,} rows: replace it by a good copy",
        )
        for group in groups:
            believe(group.total_byte_size, _packed_size(group))
    found, start, gathered = [], 0, 0
    for number, each in enumerate(sizes, start=1):
        gathered += each
        if gathered >= size or number == len(sizes):
            found.append((start, number, gathered))
            start, gathered = number, 0
    return found


def parquet_records(path: Path, start: int, stop: int, where: str) -> Iterator[Item]:
    """The records in the row groups `start` to `stop` of a parquet file. Raises: UserError."""
    with _opened(path, where) as file:
        groups = [file.metadata.row_group(number) for number in range(stop)]
        number, last = sum(group.num_rows for group in groups[:start]), sum(group.num_rows for group in groups)
        names, size, packed = class_names(_features(file.schema_arrow)), 0, sum(map(_packed_size, groups[start:]))
        for batch in file.iter_batches(ROWS_READ, row_groups=list(range(start, stop)), use_threads=False):
            rows = _rows(batch)
            size += max(batch.nbytes, sum(map(_text_size, rows)))
            believe(size, packed)
            for row in rows:
                number += 1
                here = f"{where}, row {number}"
                yield Record(here, readable(row, names)) if isinstance(row, dict) else BadRecord(f"{here} {row}")
        require(
            number == last,
            f"{where} has {number:,} rows instead of {last:,}: replace it by a good copy or leave it out",
        )


def class_names(features: Any) -> dict[str, list[str]]:
    """The names of the classes in each column that contains numbers of classes, or lists of such numbers.

    `features` describe the columns as `datasets` writes them, such as {"label": {"names": ["negative", "positive"],
    "_type": "ClassLabel"}}."""
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else None
        names = inner.get("names") if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
    return found


def class_names_in(path: Path, where: str) -> dict[str, list[str]]:
    """The names of the classes in each column of a parquet file. Raises: UserError."""
    with _opened(path, where) as file:
        return class_names(_features(file.schema_arrow))


def readable(row: Mapping[str, Any], names: ClassNames) -> dict[str, Any]:
    """The row, in which UTF-8 bytes are decoded to text, and numbers of classes are replaced by names."""
    return {name: _named(value, names[name]) if name in names else _text(value) for name, value in row.items()}


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(each) for each in value]
    if isinstance(value, dict):
        return {name: _text(each) for name, each in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass  # the value may be an image, which the encoder rejects if the task needs text
    return value


def _named(value: Any, names: list[str]) -> Any:
    """The name of the class with number `value`. The result is None for -1, which means that there is no label.

    A number without a name is returned unchanged."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if isinstance(value, int) and -1 <= value < len(names):
        return None if value == -1 else names[value]
    return value


def _features(schema: Any) -> Any:
    """The description of columns that `datasets` stores in a parquet schema, or None if the schema has none."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _rows(batch: Any) -> list[Any]:
    """The rows of a batch, with an error message in place of each row that cannot be read."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"is not UTF-8 ({error.reason}): convert it or leave it out"]
        return [row for number in range(batch.num_rows) for row in _rows(batch.slice(number, 1))]


def _text_size(row: Any) -> int:
    """The size of a row's text, which may be larger than the size in memory, because equal values are stored once."""
    return sum(len(value) for value in row.values() if isinstance(value, (str, bytes))) if isinstance(row, dict) else 0


def _packed_size(group: Any) -> int:
    return sum(group.column(number).total_compressed_size for number in range(group.num_columns))


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Any]:
    """A context with an open parquet file. Raises: UserError if the file is damaged, also while the file is read."""
    import pyarrow.parquet  # the import takes half a second, and other formats do not need it

    try:
        with path.open("rb") as file:
            yield pyarrow.parquet.ParquetFile(
                file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            )
    except Unbelievable as error:
        raise unbelievable(where) from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where} is not a complete parquet file ({one_line(error)}): replace it by a good copy or leave it out"
        ) from error
