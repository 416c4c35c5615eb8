"""From text to blocks of tokens on disk: found by a fingerprint of what made them, whole or absent.

A store is a folder of `data.cache`: the tokenizer in one, the blocks of each split in another. Every rank calls
`prepare` before any process group exists; the first one there does the work under a file lock, the others wait
and find it done.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tokenizers import Tokenizer

from opt_parallel.config import Run
from opt_parallel.data.tokens import (
    check_tokenizer,
    count_tokens,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from opt_parallel.errors import UserError, one_line
from opt_parallel.log import say
from opt_parallel.shapes import require

FORMAT = 1  # of the stores: a change of what is written makes all older ones unfindable
TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")  # what a folder is searched for: a document a file
LINE_SUFFIXES = (".jsonl",)  # and a document a line
PART_CHARACTERS = 1 << 18  # a longer document is encoded in parts
BATCH_CHARACTERS = 1 << 20  # text encoded at a time; tokens with their bookkeeping take many times its size


@dataclass(frozen=True)
class Prepared:
    """The stores of a run: blocks for `open_blocks`, and a tokenizer that `load_tokenizer` and transformers load."""

    train: Path
    validation: Path | None
    tokenizer: Path


@dataclass(frozen=True)
class Summary:
    """What went into the blocks of one split. `left_over`: tokens at the end that fill no block."""

    documents: int
    empty: int
    tokens: int
    blocks: int
    left_over: int


@dataclass(frozen=True)
class Corpus:
    """The text of one setting `key` (data.train): files in the order of their names, then datasets of the hub.

    A file that several entries lead to counts once."""

    key: str
    files: tuple[Path, ...]
    hub: tuple[str, ...]
    text_field: str

    @classmethod
    def find(cls, key: str, entries: list[str], text_field: str) -> Corpus:
        """The files and hub datasets that `entries` name. Raises: `UserError`."""
        require(bool(entries), f"{key} is not set: name a file, a folder, a glob or a hub id, or a list of them")
        found = [_find_files(key, entry) for entry in entries]
        files = sorted({path.absolute() for paths in found for path in paths})
        for path in files:
            require(os.access(path, os.R_OK), f"{key}: {path} cannot be read: change its permissions or leave it out")
        for entry, paths in zip(entries, found, strict=True):
            require(len(paths) != 1 or _has_text(paths[0]), f"{key}={entry} holds no text: name a file that does")
        hub = sorted({entry for entry, paths in zip(entries, found, strict=True) if not paths})
        return cls(key, tuple(files), tuple(hub), text_field)

    def identity(self) -> list[Any]:
        """What changes when the text does, read from the file system alone."""
        status = [path.stat() for path in self.files]
        files = [[str(path), s.st_size, s.st_mtime_ns] for path, s in zip(self.files, status, strict=True)]
        return [files, [[name, self._split] for name in self.hub], self.text_field]

    def documents(self) -> Iterator[str]:
        """Every document, white space at its end removed. Raises: `UserError` that names file and line."""
        for path in self.files:
            lines = path.suffix in (*LINE_SUFFIXES, ".json")
            texts = self._read_lines(path) if lines else iter([_decode(path.read_bytes(), f"{self.key}: {path}")])
            for text in texts:
                yield text.rstrip()
        for name in self.hub:
            for text in self._read_hub(name):
                yield text.rstrip()

    def _read_lines(self, path: Path) -> Iterator[str]:
        blank = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{self.key}: {path}, line {number}"
                if not line.strip():
                    blank = blank or number
                    continue
                require(not blank, f"{self.key}: {path}, line {blank} is blank: remove it")
                try:
                    row = json.loads(_decode(line, where))
                except json.JSONDecodeError as error:
                    reason = f"{error.msg} at column {error.colno}"
                    raise UserError(f"{where} is not JSON ({reason}): {self._expected()}") from error
                yield self._text(row, where)

    @property
    def _split(self) -> str:
        """The split of a hub dataset: train or validation."""
        return self.key.removeprefix("data.")

    def _read_hub(self, name: str) -> Iterator[str]:
        datasets.disable_progress_bars()
        try:
            dataset = datasets.load_dataset(name, split=self._split)
        except Exception as error:  # the library raises many kinds, the network more
            raise UserError(
                f"{self.key}={name}: no such file, folder or glob, and the hub did not give its split {self._split!r} "
                f"({one_line(error)}): check the path or the hub id"
            ) from error
        for number, row in enumerate(dataset):
            yield self._text(row, f"{self.key}={name}, row {number}")

    def _text(self, row: Any, where: str) -> str:
        if not isinstance(row, dict):
            raise UserError(f"{where} is a {type(row).__name__}: {self._expected()}")
        if self.text_field not in row:
            raise UserError(f"{where} has no field {self.text_field!r}, only {list(row)}: set data.text_field")
        text = row[self.text_field]
        if not isinstance(text, str):
            raise UserError(f"{where}: {self.text_field!r} is {text!r:.40}, not a string: {self._expected()}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {error.object[error.start]!r} is half a character: remove it") from error
        return text

    def _expected(self) -> str:
        return f'each line must be an object such as {{"{self.text_field}": "…"}} (data.text_field={self.text_field})'


def prepare(run: Run) -> Prepared:
    """The token stores that `run` needs, filled if they are not there.

    Raises: `UserError`, on every rank alike."""
    train = Corpus.find("data.train", run.data.train_sources, run.data.text_field)
    validation = None
    if run.data.validation_sources:
        validation = Corpus.find("data.validation", run.data.validation_sources, run.data.text_field)
        shared = set(train.files) & set(validation.files)
        if shared:
            say(f"note: {min(shared)} is in both data.train and data.validation, which flatters the validation loss")
    tokenizer = prepare_tokenizer(run, train)
    return Prepared(
        train=prepare_blocks(run, train, tokenizer),
        validation=None if validation is None else prepare_blocks(run, validation, tokenizer),
        tokenizer=tokenizer,
    )


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

    target = _folder(run, "blocks", [corpus.identity(), tokenizer.to_str(), end, length])
    folder = _whole(target, fill)
    summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    empty = f" ({summary.empty:,} empty ones left out)" if summary.empty else ""
    say(
        f"{corpus.key}: {summary.documents:,} documents{empty}, {summary.tokens:,} tokens, {summary.blocks:,} blocks "
        f"of {length:,}, {summary.left_over:,} tokens left over; in {folder}"
    )
    return folder


def write_blocks(corpus: Corpus, tokenizer: Tokenizer, end: int, length: int, folder: Path) -> Summary:
    """Write the documents, each followed by `end`, as one stream cut into rows of `length` + 1 tokens.

    Row i holds tokens i·length to (i + 1)·length, both included: the next row begins with this one's last token, so
    that every token but the first is a target once. Column `ids` of a `datasets.Dataset`, uint16 where that is
    enough. Raises: `UserError` if there is not one row."""
    datasets.disable_progress_bars()
    dtype = "uint16" if count_tokens(tokenizer) <= 1 << 16 else "int32"
    features = datasets.Features({"ids": datasets.List(datasets.Value(dtype), length=length + 1)})
    documents = empty = tokens = blocks = 0
    pending = np.empty(0, dtype)
    raw = folder / "raw"
    raw.mkdir()
    with ArrowWriter(path=str(raw / "blocks.arrow"), features=features) as writer:
        for batch in _batches(corpus.documents()):
            ids = encode_documents(tokenizer, [text for text, _ in batch])
            for part, (text, last) in zip(ids, batch, strict=True):
                if last and text:
                    part.append(end)
            documents += sum(last and bool(text) for text, last in batch)
            empty += sum(not text for text, _ in batch)
            pending = np.concatenate([pending, *(np.array(part, dtype) for part in ids)])
            rows = max(0, len(pending) - 1) // length
            tokens += sum(map(len, ids))
            if rows:
                windows = np.lib.stride_tricks.sliding_window_view(pending, length + 1)[: rows * length : length]
                writer.write_batch({"ids": windows})
                pending = pending[rows * length :]
                blocks += rows
        _require_text(corpus, documents, tokens, length)
        writer.finalize()
    datasets.Dataset.from_file(str(raw / "blocks.arrow")).save_to_disk(folder)
    shutil.rmtree(raw)
    return Summary(documents, empty, tokens, blocks, left_over=tokens - 1 - blocks * length)


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
    for document in documents:
        for part in _parts(document):
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


def _find_files(key: str, entry: str) -> list[Path]:
    """The files of one entry; none if it can only be a hub id. Raises: `UserError`."""
    path = Path(entry).expanduser()
    if path.exists():
        return _below(key, entry, path)
    if glob.has_magic(entry):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        found = [match for match in matches if match.is_file()]
        require(bool(found), f"{key}={entry} matches no file: check the pattern, or name the files")
        return found
    is_path = path.suffix in (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json")
    if is_path or not re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)?", entry):
        raise UserError(f"{key}={entry}: no such file or folder; check the path")
    return []


def _below(key: str, entry: str, path: Path) -> list[Path]:
    """`path` itself, or the text files under a folder, hidden ones aside."""
    if path.is_file():
        return [path]
    suffixes = (*TEXT_SUFFIXES, *LINE_SUFFIXES)
    found = [
        file
        for file in path.rglob("*")
        if file.suffix in suffixes
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    require(bool(found), f"{key}={entry} holds no text: a folder is searched for {', '.join(suffixes)}")
    return found


def _has_text(path: Path) -> bool:
    with path.open("rb") as file:
        return any(line.strip() for line in file)


def _decode(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {error.start} (0x{text[error.start]:02x}): convert it or leave it out"
        ) from error
