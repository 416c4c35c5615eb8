"""Datasets of the hub, in folders of the same form, and as `datasets.save_to_disk` writes them: read by the library.

Its errors are told in our words: which shard, what is wrong with it, and whether trying again can help.
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
from opt_parallel.data.text.unpacking import check_whole
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import check_fetched

# whose errors are the network's: the hub's, and what it and `datasets` reach it with
NETWORK = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp", "fsspec", "ssl", "socket", "http")
LONGEST_CAUSE = 300  # characters of the library's message
GENERATORS = ("_generate_tables", "_generate_examples")  # of the library's readers: `file` is what they are at


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset. `name`: a hub id, or a folder."""

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
        """All of it, on disk. Raises: UserError."""
        if self.is_local and is_saved(Path(self.name)):
            return self._load_saved()
        builder = self._builder()
        for path in self._files(builder):
            check_whole(path, f"{self.key}: {shown(path)}")  # the library takes some damaged ones for whole
        import datasets

        try:
            builder.download_and_prepare()
            splits, features = builder.info.splits, builder.info.features
            if self.split in splits and splits[self.split].num_examples == 0:  # which `as_dataset` fails at
                return datasets.Dataset.from_dict({name: [] for name in features}, features)
            return builder.as_dataset(split=self.split)
        except Exception as error:  # the library raises many kinds, the network more
            raise self._failure(error, "") from error

    def rows(self, dataset: Any, start: int, stop: int) -> Iterator[Record]:
        """Rows of what `load` gave. Raises: UserError."""
        names = class_names(dataset.features.to_dict())
        for first in range(start, stop, ROWS_READ):
            try:
                columns = dataset[first : min(first + ROWS_READ, stop)]
            except Exception as error:  # the library's decoders and the file system raise many kinds
                raise self._failure(error, f" after {first:,} rows") from error
            for number, values in enumerate(zip(*columns.values(), strict=True), start=first):
                row = dict(zip(columns, values, strict=True))
                yield Record(f"{self.where}, row {number}", readable(row, names))

    def stream(self, skip: int) -> Iterator[Record]:
        """Rows behind the first `skip`, as they arrive. Raises: UserError, also if it ends before its end."""
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
        """The names of the classes of a column, if it holds the numbers of some. Raises: UserError."""
        return class_names(self.load().features.to_dict()).get(column, [])

    def _check_end(self, builder: Any, number: int) -> None:
        splits = builder.info.splits or {}
        expected = splits[self.split].num_examples if self.split in splits else None
        require(
            not expected or number >= expected,
            f"{self.where} ended after {number:,} rows, its split {self.split!r} has {expected or 0:,}: nothing is "
            "lost, the same command goes on from there once the rest is there",
        )
        for path in self._files(builder):  # only now: the whole need not have arrived before the first row is used
            check_whole(path, f"{self.key}: {shown(path)}")

    def _load_saved(self) -> Any:
        import datasets  # takes a second, and files do not need it

        try:
            saved = datasets.load_from_disk(self.name)
        except Exception as error:
            raise self._failure(error, "") from error
        if isinstance(saved, datasets.DatasetDict):
            require(self.split in saved, f"{self.where} has no split {self.split!r}, only {', '.join(saved)}")
            saved = saved[self.split]
        return saved.with_format(None)  # rows as Python's own, whatever it was saved with

    def _builder(self) -> Any:
        """What reads it: the library has looked for its files, and read none. Raises: UserError."""
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # we say what it says
        require(
            not Path(self.name).is_file(), f"{self.where} is a file, which has no subset and no split: remove these"
        )
        try:
            builder = datasets.load_dataset_builder(self.name, self.subset)
        except Exception as error:
            if self.is_local:
                raise self._failure(error, "") from error
            raise UserError(
                f"{self.where}: no such file, folder or glob, and the hub did not give its split {self.split!r} "
                f"({_cause(error)}): check the path or the hub id"
            ) from error
        # Unless it is told how many rows to read at a time, it takes as many as the first row group has, and fails at
        # an empty one.
        if getattr(builder.config, "batch_size", 0) is None:
            builder.config.batch_size = ROWS_READ
        for path in self._files(builder):
            check_fetched(path, f"{self.key}: {shown(path)}")
        return builder

    def _files(self, builder: Any) -> list[Path]:
        """The files of the split that lie here. Raises: UserError if the split is none, or leads out of the folder."""
        every = builder.config.data_files or {}
        split = re.match(r"[\w.-]*", self.split)[0]  # type: ignore[index]  # also of train[:10%]
        require(not every or split in every, f"{self.where} has no split {split!r}, only {', '.join(map(str, every))}")
        paths = [Path(name) for name in every.get(split, []) if "://" not in name]
        inside = Path(os.path.abspath(self.name))
        for path in paths:
            inner = Path(os.path.abspath(path)).is_relative_to(inside)
            require(inner, f"{self.where}: its card names {shown(path)}, which is not in the folder: correct the card")
        return [path for path in paths if path.is_file()]

    def _failure(self, error: Exception, place: str) -> UserError:
        """What is said of an error of the library, or of the network."""
        if not self.is_local and _is_network(error):
            again = "nothing is lost, the same command goes on from there"
            return UserError(f"{self.where} broke off{place} ({_cause(error)}): {again}")
        shard = _shard(error)
        named = f", {shard}," if shard else ""
        return UserError(
            f"{self.where}, split {self.split!r}{named} cannot be read{place} ({_cause(error)}): correct "
            f"{'that file' if shard else 'its files'}, or name the good ones"
        )


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what caused it, down to the first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _cause(error: BaseException) -> str:
    """The library's own message, or what it hides behind a general one."""
    told = next((each for each in _chain(error) if type(each).__name__ != "DatasetGenerationError"), error)
    line = one_line(told)
    return line if len(line) <= LONGEST_CAUSE else f"{line[:LONGEST_CAUSE]}…"


def _is_network(error: BaseException) -> bool:
    for each in _chain(error):
        kinds = (kind.__module__.partition(".")[0] for kind in type(each).__mro__)
        if isinstance(each, (ConnectionError, TimeoutError)) or any(kind in NETWORK for kind in kinds):
            return True
    return False


def _shard(error: BaseException) -> str:
    """The file that the library was reading: the innermost of its readers knows; "" if none was at work."""
    for each in reversed(_chain(error)):
        for frame, _ in reversed(list(traceback.walk_tb(each.__traceback__))):
            if frame.f_code.co_name in GENERATORS and "file" in frame.f_locals:
                file = frame.f_locals["file"]
                name = file.get_origin() if hasattr(file, "get_origin") else file
                return shown(Path(str(name).rpartition("::")[2]))
    return ""
