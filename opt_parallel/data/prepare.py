"""From text to blocks of tokens on disk: found by a fingerprint of what made them, whole or absent.

A store is a folder of `data.cache`: the tokenizer in one, the blocks of each split in another. Every rank calls
`prepare` before any process group exists; the first one there does the work under a file lock, the others wait
and find it done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer

from opt_parallel.config import Run
from opt_parallel.data.encoding import Encoder, Record, TextEncoder
from opt_parallel.data.labelled import LabelledEncoder, find_labels
from opt_parallel.data.python_text import python_documents, split, write_split
from opt_parallel.data.sources import Corpus
from opt_parallel.data.store import PartWriter, TokenStore, write_manifest
from opt_parallel.data.tokens import (
    check_padding,
    check_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from opt_parallel.data_config import SourceConfig
from opt_parallel.errors import UserError
from opt_parallel.log import say
from opt_parallel.shapes import Labels, ProblemType, require
from opt_parallel.task_config import Task

LABELS = "labels.json"
FORMAT = 3  # of the stores: a change of what is written makes all older ones unfindable
BATCH_CHARACTERS = 1 << 20  # text encoded at a time; tokens with their bookkeeping take many times its size


@dataclass(frozen=True)
class PreparedSource:
    """One source of the training data and its store."""

    name: str
    weight: Fraction
    store: Path


@dataclass(frozen=True)
class Prepared:
    """The stores of a run, a tokenizer that `load_tokenizer` and transformers load, and a classifier's labels."""

    train: list[PreparedSource]
    validation: Path | None
    tokenizer: Path
    labels: Labels | None = None


def prepare(run: Run) -> Prepared:
    """The token stores that `run` needs, filled if they are not there.

    Raises: `UserError`, on every rank alike."""
    require(bool(run.data.train_sources), "data.train is not set: name a file, a folder, a glob or a hub id")
    train = [_corpus(run, "data.train", source) for source in run.data.train_sources]
    validation = [_corpus(run, "data.validation", source) for source in run.data.validation_sources]
    shared = {path for corpus in train for path in corpus.files} & {path for each in validation for path in each.files}
    if shared:
        say(f"note: {min(shared)} is in both data.train and data.validation, which flatters the validation loss")
    folder = prepare_tokenizer(run, train[0])
    labels = prepare_labels(run, train)
    encoder = encoder_for(run, load_tokenizer(str(folder)), labels)
    return Prepared(
        train=[
            PreparedSource(source.name, Fraction(source.weight), prepare_store(run, corpus, encoder))
            for source, corpus in zip(run.data.train_sources, train, strict=True)
        ],
        validation=prepare_store(run, validation[0], encoder) if validation else None,
        tokenizer=folder,
        labels=labels,
    )


def prepare_validation(run: Run) -> Prepared:
    """The store of `data.validation` alone, for a run that trains nothing.

    Raises: `UserError`, on every rank alike."""
    require(bool(run.data.validation_sources), "data.validation is not set: name a file, a folder, a glob or a hub id")
    corpora = [_corpus(run, "data.validation", source) for source in run.data.validation_sources]
    folder = prepare_tokenizer(run, corpora[0])
    labels = prepare_labels(run, corpora)
    encoder = encoder_for(run, load_tokenizer(str(folder)), labels)
    return Prepared([], prepare_store(run, corpora[0], encoder), folder, labels)


def encoder_for(run: Run, tokenizer: Tokenizer, labels: Labels | None) -> Encoder:
    """What the run's task makes of a record. Raises: UserError."""
    if run.task.name is not Task.classify:
        return TextEncoder(tokenizer, run.model.eos_token_id)
    assert labels is not None
    check_padding(tokenizer, run.model)
    return LabelledEncoder(
        tokenizer, run.model.eos_token_id, run.data.text_field, run.task, labels, run.data.sequence_length
    )


def prepare_labels(run: Run, corpora: list[Corpus]) -> Labels | None:
    """What a classifier tells apart: the task's labels, and what it leaves open as `corpora` show it."""
    task = run.task
    if task.name is not Task.classify:
        return None
    if task.labels is not None and task.problem_type is not None:
        return Labels(tuple(task.labels), task.problem_type)

    def fill(folder: Path) -> None:
        found = find_labels(task, (record for corpus in corpora for record in corpus.records()))
        assert found.problem_type is not None
        content = {"names": found.names, "problem_type": found.problem_type.value}
        (folder / LABELS).write_text(json.dumps(content), encoding="utf-8")

    asked = [task.label_field, task.labels and list(task.labels), task.problem_type and task.problem_type.value]
    folder = _whole(_folder(run, "labels", [[corpus.identity() for corpus in corpora], asked]), fill)
    found = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    return Labels(tuple(found["names"]), ProblemType(found["problem_type"]))


def _corpus(run: Run, key: str, source: SourceConfig) -> Corpus:
    return Corpus.find(key, _with_python_text(run, list(source.path)), source.text_field)


def _with_python_text(run: Run, entries: list[str]) -> list[str]:
    """`python:train` and `python:validation` replaced by files of the text that this Python carries."""
    if not {"python:train", "python:validation"} & set(entries):
        return entries

    def fill(folder: Path) -> None:
        train, validation, _ = split(python_documents())
        write_split(folder, train, validation)

    folder = _whole(_folder(run, "python-text", [sys.version]), fill)
    return [str(folder / f"{entry[7:]}.jsonl") if entry.startswith("python:") else entry for entry in entries]


def prepare_tokenizer(run: Run, train: Corpus) -> Path:
    """The folder of the run's tokenizer: a copy of the one it names, or one trained on `train`."""
    name = run.data.tokenizer
    if name is not None:
        brought = load_tokenizer(name)
        check_tokenizer(brought, name, run.model)
        target = _folder(run, "tokenizer", [brought.to_str()])
        return _whole(target, lambda folder: save_tokenizer(brought, folder))

    def fill(folder: Path) -> None:
        save_tokenizer(train_tokenizer(train.documents(), run.model.vocab_size), folder)

    folder = _whole(_folder(run, "tokenizer", [train.identity(), run.model.vocab_size]), fill)
    check_tokenizer(load_tokenizer(str(folder)), "null (trained on data.train)", run.model)
    return folder


def prepare_store(run: Run, corpus: Corpus, encoder: Encoder) -> Path:
    """The folder of the store of `corpus`, see `data.store`."""

    def fill(folder: Path) -> None:
        writer = PartWriter(folder / "part-00000", encoder.columns)
        for records in _batches(corpus.records()):
            writer.write(encoder.encode(records))
        part = writer.close()
        names = [*map(str, corpus.files), *corpus.hub]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        require(part.tokens > 0, f"{corpus.key}: there is no text in {names[0]}{more}: name files that hold some")
        write_manifest(folder, encoder.columns, [part], writer.counts)

    folder = _whole(_folder(run, "store", [corpus.identity(), encoder.identity()]), fill)
    store = TokenStore(folder)
    left_out = "".join(f", {count:,} {what}" for what, count in store.counts.items())
    say(f"{corpus.key}: {store.documents:,} documents, {store.tokens:,} tokens{left_out}; in {folder}")
    return folder


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records in batches to encode."""
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.fields["text"]) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, made by `fill(a temporary folder)` unless it is there: renamed once complete, so whole or absent.

    Raises: `UserError`; a rank that waited for another's failure raises that one's, not hours later its own."""
    if folder.exists():  # without the lock: a cache that is already filled may be read-only
        return folder
    failure, partial = Path(f"{folder}.failed"), Path(f"{folder}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        before = failure.stat().st_mtime_ns if failure.exists() else None
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return folder
            if failure.exists() and failure.stat().st_mtime_ns != before:
                raise UserError(failure.read_text(encoding="utf-8"))
            shutil.rmtree(partial, ignore_errors=True)  # left by one that was killed: the lock is ours now
            partial.mkdir()
            try:
                fill(partial)
                _flush(partial)
                partial.rename(folder)
                failure.unlink(missing_ok=True)
            except UserError as error:
                failure.write_text(str(error), encoding="utf-8")
                raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"data.cache={folder.parent} cannot be written ({error}): choose another data.cache") from error
    return folder


def _flush(folder: Path) -> None:
    """Have every file on the disk before the rename says so."""
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _folder(run: Run, kind: str, made_from: list[Any]) -> Path:
    fingerprint = hashlib.sha256(json.dumps([FORMAT, *made_from]).encode()).hexdigest()[:16]
    return Path(run.data.cache).expanduser() / f"{kind}-{fingerprint}"
