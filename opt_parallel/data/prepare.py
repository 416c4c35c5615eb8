"""From text to blocks of tokens on disk: found by a fingerprint of what made them, whole or absent.

A store is a folder of `data.cache`: the tokenizer in one, the blocks of each split in another. Every rank calls
`prepare` before any process group exists; the first one there does the work under a file lock, the others wait
and find it done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tokenizers import Tokenizer

from opt_parallel.config import Run
from opt_parallel.data.python_text import python_documents, split, write_split
from opt_parallel.data.sources import Corpus
from opt_parallel.data.tokens import (
    check_tokenizer,
    count_tokens,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from opt_parallel.errors import UserError
from opt_parallel.log import say
from opt_parallel.shapes import require

FORMAT = 2  # of the stores: a change of what is written makes all older ones unfindable
PART_CHARACTERS = 1 << 18  # a longer document is encoded in parts
BATCH_CHARACTERS = 1 << 20  # text encoded at a time; tokens with their bookkeeping take many times its size


@dataclass(frozen=True)
class Prepared:
    """The stores of a run: blocks for `open_blocks`, and a tokenizer that `load_tokenizer` and transformers load."""

    train: Path
    validation: Path | None
    tokenizer: Path


def prepare(run: Run) -> Prepared:
    """The token stores that `run` needs, filled if they are not there.

    Raises: `UserError`, on every rank alike."""
    train = Corpus.find("data.train", _with_python_text(run, run.data.train_sources), run.data.text_field)
    validation = None
    if run.data.validation_sources:
        entries = _with_python_text(run, run.data.validation_sources)
        validation = Corpus.find("data.validation", entries, run.data.text_field)
        shared = set(train.files) & set(validation.files)
        if shared:
            say(f"note: {min(shared)} is in both data.train and data.validation, which flatters the validation loss")
    tokenizer = prepare_tokenizer(run, train)
    return Prepared(
        train=prepare_blocks(run, train, tokenizer),
        validation=None if validation is None else prepare_blocks(run, validation, tokenizer),
        tokenizer=tokenizer,
    )


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


def prepare_blocks(run: Run, corpus: Corpus, tokenizer_folder: Path) -> Path:
    """The folder of the blocks of `corpus`, see `write_blocks`."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    length, end = run.data.sequence_length, run.model.eos_token_id

    def fill(folder: Path) -> None:
        summary = write_blocks(corpus, tokenizer, end, length, folder)
        (folder / "summary.json").write_text(json.dumps(asdict(summary)) + "\n", encoding="utf-8")

    folder = _whole(_folder(run, "blocks", [corpus.identity(), tokenizer.to_str(), end, length]), fill)
    summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    empty = f" ({summary.empty:,} empty ones left out)" if summary.empty else ""
    blocks, left_over = divmod(summary.tokens - 1, length)
    say(
        f"{corpus.key}: {summary.documents:,} documents{empty}, {summary.tokens:,} tokens, {blocks:,} blocks "
        f"of {length:,}, {left_over:,} tokens left over; in {folder}"
    )
    return folder


@dataclass(frozen=True)
class Summary:
    """What went into the blocks of one split; `empty` documents beside `documents`."""

    documents: int
    empty: int
    tokens: int


def write_blocks(corpus: Corpus, tokenizer: Tokenizer, end: int, length: int, folder: Path) -> Summary:
    """Write the documents, each followed by `end`, as one stream cut into rows of `length` + 1 tokens.

    Row i holds tokens i·length to (i + 1)·length, both included: the next row begins with this one's last token, so
    that every token but the first is a target once. Column `ids` of a `datasets.Dataset`, uint16 where that is
    enough. Raises: `UserError` if there is not one row."""
    datasets.disable_progress_bars()
    dtype = "uint16" if count_tokens(tokenizer) <= 1 << 16 else "int32"
    features = datasets.Features({"ids": datasets.List(datasets.Value(dtype), length=length + 1)})
    documents = empty = tokens = 0
    pending = np.empty(0, dtype)
    raw = folder / "raw"
    raw.mkdir()
    with ArrowWriter(path=str(raw / "blocks.arrow"), features=features) as writer:
        for batch in _batches(corpus.documents()):
            encoded = encode_documents(tokenizer, [text for text, _ in batch])
            for ids, (text, last) in zip(encoded, batch, strict=True):
                if not text:
                    empty += 1
                elif last:
                    documents += 1
                    ids.append(end)
            tokens += sum(map(len, encoded))
            pending = np.concatenate([pending, *(np.array(ids, dtype) for ids in encoded)])
            whole = (len(pending) - 1) // length * length
            if whole > 0:
                windows = np.lib.stride_tricks.sliding_window_view(pending, length + 1)
                writer.write_batch({"ids": windows[:whole:length]})
                pending = pending[whole:]
        _require_text(corpus, documents, tokens, length)
        writer.finalize()
    datasets.Dataset.from_file(str(raw / "blocks.arrow")).save_to_disk(folder)
    shutil.rmtree(raw)
    return Summary(documents, empty, tokens)


def _require_text(corpus: Corpus, documents: int, tokens: int, length: int) -> None:
    names = [*map(str, corpus.files), *corpus.hub]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    require(documents > 0, f"{corpus.key}: there is no text in {names[0]}{more}: name files that hold some")
    require(
        tokens > length,
        f"{corpus.key}: {tokens} tokens do not fill one block: data.sequence_length={length} needs {length + 1}; "
        "bring more text or shorten the sequence",
    )


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Documents in batches to encode, long ones in parts: (text, whether it ends its document)."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for part in chain.from_iterable(map(_parts, documents)):
        batch.append(part)
        characters += len(part[0]) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _parts(document: str) -> Iterator[tuple[str, bool]]:
    """Parted before white space that follows a word, which no byte-level token spans: the same tokens, less memory."""
    start, gap = 0, re.compile(r"(?<=\S)[ \n]")
    while cut := gap.search(document, start + PART_CHARACTERS):
        yield document[start : cut.start()], False
        start = cut.start()
    yield document[start:], True


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
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _folder(run: Run, kind: str, made_from: list[Any]) -> Path:
    fingerprint = hashlib.sha256(json.dumps([FORMAT, *made_from]).encode()).hexdigest()[:16]
    return Path(run.data.cache).expanduser() / f"{kind}-{fingerprint}"
