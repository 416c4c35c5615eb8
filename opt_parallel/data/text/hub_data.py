"""Reads datasets with the library `datasets`, from the Hugging Face hub or from a local folder.

A folder may be a copy of a hub dataset, or written by `datasets.save_to_disk`. The library's errors become UserErrors
that name the file and the cause.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_parallel.config.model import require
from opt_parallel.data.text.files import shown
from opt_parallel.data.text.finding import is_saved
from opt_parallel.data.text.parquet import ROWS_READ, class_names, readable
from opt_parallel.data.text.records import Record
from opt_parallel.data.text.unpacking import check_complete
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import check_fetched

# Errors that these packages raise are treated as network errors.
NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "ssl", "socket", "http")
LONGEST_CAUSE = 300  # maximum number of characters of the library's message that are shown
GENERATORS = (
    "_generate_tables",
    "_generate_examples",
)  # functions of the library whose local variable `file` is the file that they read


@dataclass(frozen=True)
class Dataset:
    """A split of the dataset `name`, which is a hub id or a folder."""

    key: str
    name: str
    subset: str | None
    split: str

    @property
    def where(self) -> str:
        return f"{self.key}={shown(Path(self.name))}"

    @property
    def is_local(self) -> bool:
        return Path(self.name).exists()

    def load(self) -> Any:
        """The complete split, which is downloaded if necessary and read from disk. Raises: UserError."""
        if self.is_local and is_saved(Path(self.name)):
            return self._load_saved()
        builder = self._builder()
        for path in self._files(builder):
            check_complete(path, f"{self.key}: {shown(path)}")  # the library does not detect all truncated files
        import datasets

        try:
            builder.download_and_prepare()
            splits, features = builder.info.splits, builder.info.features
            if self.split in splits and splits[self.split].num_examples == 0:  # `as_dataset` fails on an empty split
                return datasets.Dataset.from_dict({name: [] for name in features}, features)
            return builder.as_dataset(split=self.split)
        except Exception as error:  # the library and the network raise errors of many types
            raise self._failure(error, "") from error

    def rows(self, dataset: Any, start: int, stop: int) -> Iterator[Record]:
        """The rows `start` to `stop` of a loaded `dataset`. Raises: UserError."""
        names = class_names(dataset.features.to_dict())
        for first in range(start, stop, ROWS_READ):
            try:
                columns = dataset[first : min(first + ROWS_READ, stop)]
            except Exception as error:  # decoders and file systems raise errors of many types
                raise self._failure(error, f" after {first:,} rows") from error
            for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
                row = dict(zip(columns, values, strict=True))
                yield Record(f"{self.where}, row {number}", readable(row, names))

    def stream(self, skip: int) -> Iterator[Record]:
        """The rows after the first `skip` rows, read as a stream. Raises: UserError, also if the stream ends early."""
        if self.is_local and is_saved(Path(self.name)):
            dataset = self.load()
            yield from self.rows(dataset, skip, len(dataset))
            return
        builder, number = self._builder(), skip
        try:
            dataset = builder.as_streaming_dataset(split=self.split)
            names = class_names(dataset.features and dataset.features.to_dict())
            rows = iter(dataset.skip(skip) if skip else dataset)
        except Exception as error:
            raise self._failure(error, "") from error
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:
                raise self._failure(error, f" after {number:,} rows") from error
            yield Record(f"{self.where}, row {number}", readable(row, names))
            number += 1
        self._check_end(builder, number)

    def class_names(self, column: str) -> list[str]:
        """The names of the classes in a column, or an empty list if the column has no classes. Raises: UserError."""
        return class_names(self.load().features.to_dict()).get(column, [])

    def _check_end(self, builder: Any, number: int) -> None:
        splits = builder.info.splits or {}
        expected = splits[self.split].num_examples if self.split in splits else None
        require(
            not expected or number >= expected,
            f"{self.where} ended after {number:,} rows, but its split {self.split!r} has {expected or 0:,}: "
            "repeat the command when the other rows are available, and it resumes after these rows",
        )
        for path in self._files(builder):  # checked after reading, because files may be completed during reading
            check_complete(path, f"{self.key}: {shown(path)}")

    def _load_saved(self) -> Any:
        import datasets  # the import takes a second, and other sources do not need the library

        try:
            saved = datasets.load_from_disk(self.name)
        except Exception as error:
            raise self._failure(error, "") from error
        if isinstance(saved, datasets.DatasetDict):
            require(self.split in saved, f"{self.where} has no split {self.split!r}, only {', '.join(saved)}")
            saved = saved[self.split]
        return saved.with_format(None)  # the rows become Python objects, independently of the saved format

    def _builder(self) -> Any:
        """The library's dataset builder, which has found the files but not yet read them. Raises: UserError."""
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # its messages become UserErrors here
        require(
            not Path(self.name).is_file(),
            f"{self.where} is a file, which has neither subset nor split: remove these two keys",
        )
        try:
            builder = datasets.load_dataset_builder(self.name, self.subset)
        except Exception as error:
            if self.is_local:
                raise self._failure(error, "") from error
            raise UserError(
                f"{self.where}: not a local file, folder or glob, and its split {self.split!r} could not be read from "
                f"the hub ({_cause(error)}): check the path or the hub id"
            ) from error
        # By default, the library reads as many rows at a time as the first row group has, and fails if it has no rows.
        if getattr(builder.config, "batch_size", 0) is None:
            builder.config.batch_size = ROWS_READ
        for path in self._files(builder):
            check_fetched(path, f"{self.key}: {shown(path)}")
        return builder

    def _files(self, builder: Any) -> list[Path]:
        """The local files of the split. Raises: UserError if the split is missing or has a file outside the folder."""
        every = builder.config.data_files or {}
        split = re.match(r"[\w.-]*", self.split)[0]  # type: ignore[index]  # such as train in train[:10%]
        require(not every or split in every, f"{self.where} has no split {split!r}, only {', '.join(map(str, every))}")
        paths = [Path(name) for name in every.get(split, []) if "://" not in name]
        inside = Path(os.path.abspath(self.name))
        for path in paths:
            inner = Path(os.path.abspath(path)).is_relative_to(inside)
            require(inner, f"{self.where}: README.md names {shown(path)}, which is not in the folder: correct it")
        return [path for path in paths if path.is_file()]

    def _failure(self, error: Exception, after: str) -> UserError:
        """The UserError for an error of the library or the network. `after` is the position of the error as text."""
        if not self.is_local and _is_network(error):
            again = "repeat the command, which continues from this point"
            return UserError(f"{self.where}: the connection failed{after} ({_cause(error)}): {again}")
        shard = _shard(error)
        named = f", {shard}," if shard else ""
        return UserError(
            f"{self.where}, split {self.split!r}{named} cannot be read{after} ({_cause(error)}): correct "
            f"{'this file' if shard else 'its files'}, or name the intact files"
        )


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, its cause, the cause of its cause, and so on."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _cause(error: BaseException) -> str:
    """The message of an error, or of its first cause if the error is a generic DatasetGenerationError."""
    specific = next((each for each in _chain(error) if type(each).__name__ != "DatasetGenerationError"), error)
    line = one_line(specific)
    return line if len(line) <= LONGEST_CAUSE else f"{line[:LONGEST_CAUSE]}…"


def _is_network(error: BaseException) -> bool:
    for each in _chain(error):
        kinds = (kind.__module__.partition(".")[0] for kind in type(each).__mro__)
        if isinstance(each, (ConnectionError, TimeoutError)) or any(kind in NETWORK for kind in kinds):
            return True
    return False


def _shard(error: BaseException) -> str:
    """The name of the file that the library was reading, or an empty string if the traceback does not contain it."""
    for each in reversed(_chain(error)):
        for frame, _ in reversed(list(traceback.walk_tb(each.__traceback__))):
            if frame.f_code.co_name in GENERATORS and "file" in frame.f_locals:
                file = frame.f_locals["file"]
                name = file.get_origin() if hasattr(file, "get_origin") else file
                return shown(Path(str(name).rpartition("::")[2]))
    return ""
