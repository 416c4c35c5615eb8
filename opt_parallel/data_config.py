"""Where a run's text is: the sources of its splits, its tokenizer, its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_parallel.shapes import Section, require


@dataclass(frozen=True)
class SourceConfig:
    """One source of a split: where its text is, and its share of the run's samples among the split's sources."""

    name: str
    path: tuple[str, ...]
    weight: str = "1"  # as it was written: shares are exact
    text_field: str = "text"


@dataclass
class DataConfig(Section):
    """`train`, `validation`: a file, folder, glob or hub id, `python:train` or `python:validation` for the text that
    every Python carries, or a list of these, which is one source. Or a list of sources, each with `path` (one of the
    above), `weight`, and if need be `name` and `text_field`. `tokenizer`: a folder, a hub id, or null: `init_from`'s
    own, and without `init_from` one of `model.vocab_size` tokens that is trained on the training text. `text_field`:
    the key of a jsonl line."""

    train: Any = None
    validation: Any = None
    tokenizer: str | None = None
    sequence_length: int = 2048
    text_field: str = "text"
    cache: str = "cache"

    def check(self) -> None:
        require(self.sequence_length >= 1, f"data.sequence_length={self.sequence_length} must be at least 1")
        self.train_sources  # noqa: B018  # what is wrong with them is said here
        self.validation_sources  # noqa: B018

    @property
    def train_sources(self) -> list[SourceConfig]:
        return self._sources("train", self.train)

    @property
    def validation_sources(self) -> list[SourceConfig]:
        return self._sources("validation", self.validation)

    def _sources(self, split: str, value: Any) -> list[SourceConfig]:
        entries = _as_list(value)
        if not any(isinstance(entry, dict) for entry in entries):
            _require_paths(f"data.{split}", value)
            return [SourceConfig(split, tuple(entries), text_field=self.text_field)] if entries else []
        return [self._source(f"data.{split}[{number}]", split, entry) for number, entry in enumerate(entries)]

    def _source(self, key: str, split: str, entry: Any) -> SourceConfig:
        known = ["path", "weight", "name", "text_field"]
        require(
            isinstance(entry, dict) and set(entry) <= set(known) and "path" in entry,
            f"{key}={entry} is no source: give it a path, and if need be {', '.join(known[1:])}",
        )
        paths = _as_list(entry["path"])
        _require_paths(f"{key}.path", entry["path"])
        weight = str(entry.get("weight", 1))
        require(
            re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight) is not None and float(weight) > 0,
            f"{key}.weight={weight} must be a positive number",
        )
        name = entry.get("name") or Path(paths[0]).stem
        return SourceConfig(name, tuple(paths), weight, entry.get("text_field") or self.text_field)


def _require_paths(key: str, value: Any) -> None:
    require(
        all(isinstance(entry, str) and entry for entry in _as_list(value)),
        f"{key}={value} must be a path, a glob or a hub id, or a list of them",
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
