"""Reads datasets with the `datasets` library: from the hub, from folders in the hub's form, and as saved to disk.

The library's errors become UserErrors that name the shard, the cause, and whether to try again.
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

# packages whose errors count as network errors
NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "ssl", "socket", "http")
LONGEST_CAUSE = 300  # characters of the library's message that are shown
GENERATORS = (
    "_generate_tables",
    "_generate_examples",
)  # the library's readers, whose local variable `file` is the shard


@dataclass(frozen=True)
class Dataset:
    """A split of a dataset. `name`: a hub id or a folder."""

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
        """The complete split, on disk. Raises: UserError."""
        if self.is_local and is_saved(Path(self.name)):
            return self._load_saved()
        builder = self._builder()
        for path in self._files(builder):
            check_complete(path, f"{self.key}: {shown(path)}")  # the library accepts some truncated files
        import datasets

        try:
            builder.download_and_prepare()
            splits, features = builder.info.splits, builder.info.features
            if self.split in splits and splits[self.split].num_examples == 0:  # `as_dataset` fails for an empty split
                return datasets.Dataset.from_dict({name: [] for name in features}, features)
            return builder.as_dataset(split=self.split)
        except Exception as error:  # the library and the network raise many types
            raise self._failure(error, "") from error

    def rows(self, dataset: Any, start: int, stop: int) -> Iterator[Record]:
        """Rows `start` to `stop` of a loaded dataset. Raises: UserError."""
        names = class_names(dataset.features.to_dict())
        for first in range(start, stop, ROWS_READ):
            try:
                columns = dataset[first : min(first + ROWS_READ, stop)]
            except Exception as error:  # decoders and file systems raise many types
                raise self._failure(error, f" after {first:,} rows") from error
            for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
                row = dict(zip(columns, values, strict=True))
                yield Record(f"{self.where}, row {number}", readable(row, names))

    def stream(self, skip: int) -> Iterator[Record]:
        """The rows after the first `skip`, as they arrive. Raises: UserError, also if the stream ends early."""
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
        """The class names of a column; empty if it is not a class column. Raises: UserError."""
        return class_names(self.load().features.to_dict()).get(column, [])

    def _check_end(self, builder: Any, number: int) -> None:
        splits = builder.info.splits or {}
        expected = splits[self.split].num_examples if self.split in splits else None
        require(
            not expected or number >= expected,
            f"{self.where} ended after {number:,} rows, but its split {self.split!r} has {expected or 0:,}: "
            "nothing is lost; repeat the command when the rest is available, and it resumes from there",
        )
        for path in self._files(builder):  # checked at the end: the files may arrive during reading
            check_complete(path, f"{self.key}: {shown(path)}")

    def _load_saved(self) -> Any:
        import datasets  # imported late: takes a second, and plain files do not need it

        try:
            saved = datasets.load_from_disk(self.name)
        except Exception as error:
            raise self._failure(error, "") from error
        if isinstance(saved, datasets.DatasetDict):
            require(self.split in saved, f"{self.where} has no split {self.split!r}, only {', '.join(saved)}")
            saved = saved[self.split]
        return saved.with_format(None)  # rows as Python objects, whatever format was saved

    def _builder(self) -> Any:
        """The library's builder, which has found the files but read none. Raises: UserError."""
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # its messages become UserErrors here
        require(
            not Path(self.name).is_file(),
            f"{self.where} is a file, which has neither subset nor split: remove both",
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
        # By default the library reads as many rows at a time as the first row group has, and fails if that is empty.
        if getattr(builder.config, "batch_size", 0) is None:
            builder.config.batch_size = ROWS_READ
        for path in self._files(builder):
            check_fetched(path, f"{self.key}: {shown(path)}")
        return builder

    def _files(self, builder: Any) -> list[Path]:
        """The local files of the split. Raises: UserError if the split is missing or leaves the folder."""
        every = builder.config.data_files or {}
        split = re.match(r"[\w.-]*", self.split)[0]  # type: ignore[index]  # the name in train[:10%]
        require(not every or split in every, f"{self.where} has no split {split!r}, only {', '.join(map(str, every))}")
        paths = [Path(name) for name in every.get(split, []) if "://" not in name]
        inside = Path(os.path.abspath(self.name))
        for path in paths:
            inner = Path(os.path.abspath(path)).is_relative_to(inside)
            require(inner, f"{self.where}: its card names {shown(path)}, which is not in the folder: correct the card")
        return [path for path in paths if path.is_file()]

    def _failure(self, error: Exception, after: str) -> UserError:
        """The UserError for an error of the library or the network. `after`: how far reading came, for the message."""
        if not self.is_local and _is_network(error):
            again = "nothing is lost; repeat the command, and it resumes from there"
            return UserError(f"{self.where} broke off{after} ({_cause(error)}): {again}")
        shard = _shard(error)
        named = f", {shard}," if shard else ""
        return UserError(
            f"{self.where}, split {self.split!r}{named} cannot be read{after} ({_cause(error)}): correct "
            f"{'that file' if shard else 'its files'}, or name the good ones"
        )


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error followed by its causes, outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _cause(error: BaseException) -> str:
    """The message of the first error that is not a generic DatasetGenerationError."""
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
    """The file that the library was reading, from the frame of its innermost reader; "" if there is none."""
    for each in reversed(_chain(error)):
        for frame, _ in reversed(list(traceback.walk_tb(each.__traceback__))):
            if frame.f_code.co_name in GENERATORS and "file" in frame.f_locals:
                file = frame.f_locals["file"]
                name = file.get_origin() if hasattr(file, "get_origin") else file
                return shown(Path(str(name).rpartition("::")[2]))
    return ""
