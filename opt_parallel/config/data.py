"""Where a run's text is: the sources of its splits, its tokenizer, its cache."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from opt_parallel.config.model import Section, require
from opt_parallel.config.paths import PATH

KNOWN = ["path", "weight", "name", "text_field", "template", "subset", "split", "stream"]  # of a source
PYTHON_TEXT = {"path": ("python:train", "python:validation")}  # of what every Python carries


class BadRecordsPolicy(Enum):
    """What becomes of a record that cannot be read or lacks what the task needs: `error` names the first and says how
    many there are; `skip` leaves them out, counts them and lists the first."""

    error = "error"
    skip = "skip"


class SpecialTokens(Enum):
    """What a special token is that a text spells, as `</s>`: four characters of `text` like any other, or that token
    (`tokens`). The same in documents, examples and prompts, in training, evaluation and generation."""

    text = "text"
    tokens = "tokens"


@dataclass(frozen=True)
class SourceConfig:
    """One source of a split: where its text is, and its share of the run's samples among the split's sources.

    `subset` and `split` are those of a dataset, of the hub or in a folder of the same form; `stream`: trained on while
    it is read, instead of prepared before."""

    name: str
    path: tuple[str, ...]
    weight: str = "1"  # as it was written: shares are exact
    text_field: str = "text"
    template: str | None = None
    subset: str | None = None
    split: str | None = None
    stream: bool = False


@dataclass
class DataConfig(Section):
    """`train`, `validation`: a file, folder, glob or hub id, `python:train` or `python:validation` for the text that
    every Python carries, or a list of these, which is one source. Or a list of sources, each with `path` (one of the
    above) and if need be `weight`, `name`, `text_field`, `template`, `subset`, `split`, `stream`. `tokenizer`: a
    tokenizer.json or its folder, a hub id, or null: `init_from`'s own, and without `init_from` one of
    `model.vocab_size` tokens that is trained on the training text. `text_field`: the field of a record that is its
    text; `template`: a text made of several, such as "{title}: {body}". `special_tokens`: what a special token is that
    a text spells. `deduplicate`: each text of a source counts once. `held_out`: the share of the training documents to
    validate on where `validation` is null. `bad_records`: what becomes of records that cannot be used. `workers`:
    processes that prepare; 0: as many as there are CPUs for this one."""

    # training text: files, folders, globs, hub ids, python:train; or a list of sources (docs/data.md)
    train: Any = field(default=None, metadata=PYTHON_TEXT)
    # held-out text, as train
    validation: Any = field(default=None, metadata=PYTHON_TEXT)
    # tokenizer.json, its folder, or a hub id; null: init_from's, else one is trained on the training text
    tokenizer: str | None = field(default=None, metadata=PATH)
    # tokens of a sample
    sequence_length: int = 2048
    # the field of a record that holds its text
    text_field: str = "text"
    # a text made of several fields, such as "{title}: {body}"
    template: str | None = None
    # what a special token is that a text spells, as </s>: text like any other, or that token (tokens)
    special_tokens: SpecialTokens = SpecialTokens.text
    # train while the text is read, instead of preparing it first
    stream: bool = False
    # use each text of a source once
    deduplicate: bool = False
    # share of the training documents to validate on, where validation is null and evaluation.every is set
    held_out: float = 0.005
    # error: a record that cannot be used ends the run; skip: leave it out and list it
    bad_records: BadRecordsPolicy = BadRecordsPolicy.error
    # processes that prepare text; 0: one for each CPU that this process may use
    workers: int = 0
    # folder of prepared tokens, shared between runs
    cache: str = field(default="cache", metadata=PATH)

    def check(self) -> None:
        require(self.sequence_length >= 1, f"data.sequence_length={self.sequence_length} must be at least 1")
        require(0 <= self.held_out < 1, f"data.held_out={self.held_out} must be a share: 0 (nothing) or more, below 1")
        require(self.workers >= 0, f"data.workers={self.workers} must not be negative (0: one for each CPU)")
        sources = self.train_sources + self.validation_sources
        names = [source.name for source in self.train_sources]
        for number, name in enumerate(names):
            require(
                name not in names[:number],
                f"data.train[{number}] has the name {name!r}, which an earlier source has: give it another, name: …",
            )
        require(
            not (self.deduplicate and any(source.stream for source in sources)),
            "data.deduplicate=true needs all of the text before the first step, which a stream is not: set one of "
            "data.deduplicate and stream to false",
        )

    @property
    def train_sources(self) -> list[SourceConfig]:
        return self._sources("train", self.train)

    @property
    def validation_sources(self) -> list[SourceConfig]:
        return self._sources("validation", self.validation)

    def _sources(self, split: str, value: Any) -> list[SourceConfig]:
        entries = _as_list(value)
        if not any(isinstance(entry, dict) for entry in entries):
            return [self._source(f"data.{split}", split, {"path": entries, "name": split})] if entries else []
        return [self._source(f"data.{split}[{number}]", split, entry) for number, entry in enumerate(entries)]

    def _source(self, key: str, split: str, entry: Any) -> SourceConfig:
        require(
            isinstance(entry, dict) and set(entry) <= set(KNOWN) and "path" in entry,
            f"{key}={entry} is no source: give it a path, and if need be {', '.join(KNOWN[1:])}",
        )
        paths = _as_list(entry["path"])
        require(
            bool(paths) and all(isinstance(path, str) and path for path in paths),
            f"{key}={paths[0] if len(paths) == 1 else paths} must be a path, a glob or a hub id, or a list of them",
        )
        for name in ("name", "text_field", "template", "subset", "split"):
            value = entry.get(name)
            require(value is None or isinstance(value, str), f"{key}.{name}={value} is no text: put it in quotes")
        weight = str(entry.get("weight", 1))
        require(
            re.fullmatch(r"\d*\.?\d+(e[+-]?\d{1,2})?", weight) is not None and 0 < float(weight) < math.inf,
            f"{key}.weight={weight} must be a positive number",
        )
        stream = entry.get("stream", self.stream and split == "train")
        require(isinstance(stream, bool), f"{key}.stream={stream} must be true or false")
        require(not stream or split == "train", f"{key}.stream=true: only data.train can be a stream; set it to false")
        template = entry.get("template") or (None if "text_field" in entry else self.template)
        _check_template(f"{key}.template" if entry.get("template") else "data.template", template)
        return SourceConfig(
            entry.get("name") or Path(paths[0]).stem,
            tuple(paths),
            weight,
            entry.get("text_field") or self.text_field,
            template,
            entry.get("subset"),
            entry.get("split"),
            stream,
        )


def _check_template(key: str, template: str | None) -> None:
    if template is None:
        return
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        fields = [str(error)]
    require(
        bool(fields) and all(field.isidentifier() for field in fields),
        f"{key}={template!r} names no fields as it should: write their names in braces, such as {{title}}: {{text}}",
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
