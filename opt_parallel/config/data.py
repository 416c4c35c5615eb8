"""Configuration of a run's data sources, tokenizer and text preparation."""

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

# The configuration keys of a data source.
KNOWN = ["path", "weight", "name", "text_field", "template", "subset", "split", "stream", "dtype", "ids_of"]
# The types of token ids in files without a header.
TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
# The values python:train and python:validation mean the documentation in Python's standard library.
PYTHON_TEXT = {"path": ("python:train", "python:validation")}


class BadRecordsPolicy(Enum):
    """Handling of bad records, which cannot be read or lack a field. `error` ends the run with the first bad record and
    the number of bad records. `skip` leaves bad records out, counts them and lists the first ones."""

    error = "error"
    skip = "skip"


class SpecialTokens(Enum):
    """Whether a special token's spelling in a text, such as `</s>`, is encoded as ordinary text (`text`) or as this
    token (`tokens`). The setting applies to documents, examples and prompts, in training, evaluation and generation."""

    text = "text"
    tokens = "tokens"


@dataclass(frozen=True)
class SourceConfig:
    """One data source of the training or validation split. A source's share of the run's samples is its `weight`
    divided by the sum of the weights of the split's sources.

    `subset` and `split` select a part of a dataset on the Hugging Face hub or in a folder with the hub's layout.
    `stream` trains while the text is read instead of preparing all text first. `dtype` is the type of token ids in
    files without a header. `ids_of` is the tokenizer that the source's token ids belong to, if it is another one than
    the run's."""

    name: str
    path: tuple[str, ...]
    weight: str = "1"  # the weight is a decimal text, so that shares are exact
    text_field: str = "text"
    template: str | None = None
    subset: str | None = None
    split: str | None = None
    stream: bool = False
    dtype: str | None = None
    ids_of: str | None = None


@dataclass
class DataConfig(Section):
    """A run's text and its preparation.

    `train` and `validation` each take a file, a folder, a glob, a hub id, or `python:train` or `python:validation`
    (documentation in Python's standard library). A list of files, folders, globs or hub ids is one source. A list of
    mappings is several sources, each with a `path` and optionally `weight`, `name`, `text_field`, `template`, `subset`,
    `split`, `stream`, `dtype` and `ids_of`. With `tokenizer=null`, the tokenizer of `init_from` is used; without
    `init_from`, a tokenizer of `model.vocab_size` tokens is trained on the training text."""

    # training text: files, folders, globs, hub ids, python:train; or a list of sources (docs/data.md)
    train: Any = field(default=None, metadata=PYTHON_TEXT)
    # held-out text, in the same form as train
    validation: Any = field(default=None, metadata=PYTHON_TEXT)
    # tokenizer.json, its folder, or a hub id; null: the tokenizer of init_from, else a new one trained on the training
    # text
    tokenizer: str | None = field(default=None, metadata=PATH)
    # number of tokens in a sample
    sequence_length: int = 2048
    # the field of a record that holds its text, or a list of token ids, such as input_ids
    text_field: str = "text"
    # builds the text from several fields, such as "{title}: {body}"
    template: str | None = None
    # encode a special token's spelling in a text, such as </s>, as ordinary text (text) or as this token (tokens)
    special_tokens: SpecialTokens = SpecialTokens.text
    # type of the token ids in files without a header, such as uint32; null: uint16, or as the file's header says
    dtype: str | None = None
    # tokenizer that the token ids in the files belong to (tokenizer.json, its folder, or a hub id), such as gpt2, if it
    # numbers the same tokens otherwise than data.tokenizer; null: data.tokenizer
    ids_of: str | None = field(default=None, metadata=PATH)
    # train while the text is read, instead of preparing it first
    stream: bool = False
    # number of samples of each training source to use, over and over; null: all
    samples: int | None = None
    # drop repeated texts within a source
    deduplicate: bool = False
    # share of the training documents held out for validation if validation is null and evaluation.every > 0
    held_out: float = 0.005
    # error: an unusable record ends the run; skip: leave unusable records out and list them
    bad_records: BadRecordsPolicy = BadRecordsPolicy.error
    # number of processes that prepare text; 0: one for each available CPU
    workers: int = 0
    # folder of tokenized text, which runs share
    cache: str = field(default="cache", metadata=PATH)

    def check(self) -> None:
        require(self.sequence_length >= 1, f"data.sequence_length={self.sequence_length} must be at least 1")
        require(0 <= self.held_out < 1, f"data.held_out={self.held_out} must be a share: 0 (nothing) or more, below 1")
        require(self.workers >= 0, f"data.workers={self.workers} must not be negative (0: one for each CPU)")
        require(
            self.samples is None or self.samples >= 1, f"data.samples={self.samples} must be at least 1 (null: all)"
        )
        sources = self.train_sources + self.validation_sources
        names = [source.name for source in self.train_sources]
        for number, name in enumerate(names):
            require(
                name not in names[:number],
                f"data.train[{number}] has the name {name!r} of another source: give it another name, name: …",
            )
        require(
            self.samples is None or not any(source.stream for source in sources),
            f"data.samples={self.samples} needs prepared text: set stream to false, or data.samples to null",
        )
        require(
            not (self.deduplicate and any(source.stream for source in sources)),
            "data.deduplicate=true needs all text before the first step, and a stream is read during training: set "
            "data.deduplicate or stream to false",
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
            f"{key}={entry} is not a source: give it a path, and optionally {', '.join(KNOWN[1:])}",
        )
        paths = _as_list(entry["path"])
        require(
            bool(paths) and all(isinstance(path, str) and path for path in paths),
            f"{key}={paths[0] if len(paths) == 1 else paths} must be a path, a glob or a hub id, or a list of them",
        )
        for name in ("name", "text_field", "template", "subset", "split", "dtype", "ids_of"):
            value = entry.get(name)
            require(value is None or isinstance(value, str), f"{key}.{name}={value} is not a text: put it in quotes")
        weight = str(entry.get("weight", 1))
        require(
            re.fullmatch(r"\d*\.?\d+(e[+-]?\d{1,2})?", weight) is not None and 0 < float(weight) < math.inf,
            f"{key}.weight={weight} must be a positive number",
        )
        stream = entry.get("stream", self.stream and split == "train")
        require(isinstance(stream, bool), f"{key}.stream={stream} must be true or false")
        require(not stream or split == "train", f"{key}.stream=true: only data.train can be a stream; set it to false")
        dtype = entry.get("dtype") or self.dtype
        where = f"{key}.dtype" if entry.get("dtype") else "data.dtype"
        require(dtype is None or dtype in TYPES, f"{where}={dtype} must be one of {', '.join(TYPES)}")
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
            dtype,
            entry.get("ids_of") or self.ids_of,
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
        f"{key}={template!r} is not a template: write field names in braces, such as {{title}}: {{text}}",
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
