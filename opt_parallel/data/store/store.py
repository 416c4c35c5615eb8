"""The token store: a folder of flat binary arrays in parts, written by preparation and read by training.

    store.json                  the columns, the parts in order, the counts
    part-00000/ids.bin          the token ids of the part's documents, concatenated, in the smallest sufficient type
    part-00000/lengths.bin, …   the length of each document; other columns have one entry per token or per document
    part-00000/part.json        a summary of the part, with a checksum of each block of its files

Parts are in the order of the text. A row of a batch may cross the boundary of two parts, so a token store does not
depend on the sequence length. A reader reads only the bytes that it needs, so its memory does not grow with the text.
The ids of a part may be elsewhere, in a file of the user's (`elsewhere.py`). Readers of the store notice no difference.

store.json has its own checksum and the checksum of each part.json. Each block is checked when it is read, so training
never uses a changed block. Token stores of earlier versions have no checksums and are read without a check.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal, NotRequired
from zlib import crc32

import numpy as np
from typing_extensions import TypedDict

from opt_parallel.data.encode.columns import Column, Encoded
from opt_parallel.data.store.blocks import BLOCK, first_wrong
from opt_parallel.data.store.elsewhere import COLUMNS, Elsewhere, Spans, check_file, read_ids
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.atomic import write_text
from opt_parallel.storage.checked import Count, Size, dump_checked, parse_checked, read_checked

MANIFEST, META = "store.json", "part.json"
FORMAT = 2  # Format 1 had no checksums.
LARGEST = 2**30  # Maximum bytes of store.json.
LOOKED_INTO = 200  # Number of parts that are checked when a token store is opened.
PART = re.compile(r"part-[0-9]+")
PARTS_KNOWN = 1024  # number of parts whose checksums are cached in memory
PARTS_LAID_OUT = 32  # number of parts with ids elsewhere, whose documents are cached in memory


class Damaged(UserError):
    """The error for a damaged token store. `what` describes the damage in the message."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(
            f"{folder} is not a complete token store: {what}; remove it, and the next start builds it again"
        )
        self.what = what


@dataclass(frozen=True)
class Part:
    """A part of a token store, which holds complete documents.

    `checksum` is the checksum of its part.json, or None if an earlier version wrote the part. `elsewhere` is the file
    that has the part's ids, or None if the part has them."""

    name: str
    documents: int
    tokens: int
    checksum: str | None = None
    elsewhere: Elsewhere | None = None

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.elsewhere else {name: value for name, value in values.items() if name != "elsewhere"}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Part:
        elsewhere = values.get("elsewhere")
        return cls(**{**values, "elsewhere": Elsewhere(**elsewhere) if elsewhere else None})


class PartWriter:
    """Writes one part of a token store, one batch of documents at a time."""

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        self.folder, self.columns = folder, columns
        self.documents = self.tokens = 0
        self.counts: Counter[str] = Counter()
        folder.mkdir(parents=True)
        self.files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in columns}

    def write(self, encoded: Encoded) -> None:
        """Append a batch of documents to the part."""
        lengths = encoded.columns["lengths"]
        for name, column in self.columns.items():
            values = encoded.columns[name].astype(column.dtype)
            assert values.size == column.width * (int(lengths.sum()) if column.per_token else len(lengths))
            self.files[name].write(values.tobytes())
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.counts += encoded.counts

    def close(self) -> Part:
        """Close the files of the part, and return its description."""
        for file in self.files.values():
            file.close()
        return Part(self.folder.name, self.documents, self.tokens)


def write_manifest(
    folder: Path, columns: Mapping[str, Column], parts: Iterable[Part], counts: Mapping[str, int], **more: Any
) -> None:
    """Write store.json, which completes a token store. `more` are further top-level entries of the file."""
    content = {
        "format": FORMAT,
        "columns": {name: asdict(column) for name, column in columns.items()},
        "parts": [part.as_json() for part in parts],
        "counts": dict(counts),
        **more,
    }
    write_text(folder / MANIFEST, dump_checked(content) + "\n")


class _Column(TypedDict):
    dtype: Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32", "float64"]
    per_token: bool
    width: Size


class _Elsewhere(TypedDict):
    path: str
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
    offset: Count
    size: Count
    end: Count
    table: str | None


class _Part(TypedDict):
    name: str
    documents: Count
    tokens: Count
    checksum: NotRequired[str | None]
    elsewhere: NotRequired[_Elsewhere]


class _Statistics(TypedDict):
    text_bytes: Count
    lengths: dict[str, float]
    unigram_entropy: float
    examples: NotRequired[list[str]]
    bad_records: NotRequired[list[str]]


class _Manifest(TypedDict):
    format: Literal[1, 2]
    columns: dict[str, _Column]
    parts: list[_Part]
    counts: dict[str, Count]
    statistics: NotRequired[_Statistics]


@functools.cache
def _types() -> Any:
    """The type adapters for store.json. pydantic is imported in this function, because its import is slow."""
    from pydantic import TypeAdapter

    return TypeAdapter(_Manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of store.json in `folder`. Raises: Damaged."""
    try:
        manifest = read_checked(folder / MANIFEST, LARGEST)
    except OSError as error:
        raise Damaged(folder, f"{MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
    try:
        _types().validate_python(manifest, strict=True)
    except ValueError as error:
        raise Damaged(folder, f"{MANIFEST} has the wrong content ({one_line(error)})") from error
    if unknown := manifest.keys() - _Manifest.__annotations__.keys():
        raise Damaged(folder, f"{MANIFEST} has the unknown key {min(unknown)!r}")
    if not {"ids", "lengths"} <= manifest["columns"].keys():
        raise Damaged(folder, f"{MANIFEST} lacks the columns ids and lengths")
    for part in manifest["parts"]:
        if not PART.fullmatch(part["name"]):
            raise Damaged(folder, f"{MANIFEST} names {part['name']!r}, which is not the name of a part")
    return manifest


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def read_part(folder: Path, name: str, checksum: str | None = None) -> tuple[dict[str, Any], str]:
    """The content of a part's part.json, and the file's checksum. Raises: Damaged, also if `checksum` differs."""
    try:
        text = (folder / name / META).read_bytes()
        found = f"{crc32(text):08x}"
        if checksum not in (None, found):
            raise ValueError("it differs from its checksum")
        return parse_checked(text), found
    except OSError as error:
        raise Damaged(folder, f"{name}/{META} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Damaged(folder, f"{name}/{META} cannot be read ({error})") from error


class TokenStore:
    """Reads the documents and tokens of a token store by index. Each block is compared with its checksum when read."""

    def __init__(self, folder: Path | str, vocab_size: int | None = None) -> None:
        """Open the token store in `folder`, and check the files of a sample of its parts. Raises: Damaged.

        If `vocab_size` is given, a token id that is not below it raises an error when it is read."""
        self.folder, self.vocab_size = Path(folder), vocab_size
        self.manifest = read_manifest(self.folder)
        self.columns = {name: Column(**column) for name, column in self.manifest["columns"].items()}
        self.parts = [Part.of_json(part) for part in self.manifest["parts"]]
        self._first_token = list(accumulate((part.tokens for part in self.parts), initial=0))
        self._first_document = list(accumulate((part.documents for part in self.parts), initial=0))
        self.remember()
        for number in range(0, len(self.parts), max(1, len(self.parts) // LOOKED_INTO)):
            self._known(number)

    def remember(self) -> None:
        """Start to cache the checksums of recently read parts."""
        self._known = functools.lru_cache(PARTS_KNOWN)(self._look_at)
        self._laid_out = functools.lru_cache(PARTS_LAID_OUT)(self._ends_in)

    @property
    def tokens(self) -> int:
        return self._first_token[-1]

    @property
    def documents(self) -> int:
        return self._first_document[-1]

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of documents that were left out or cut, by reason."""
        return self.manifest["counts"]

    @property
    def statistics(self) -> dict[str, Any]:
        """The statistics in store.json. A token store that another program wrote may have none."""
        return self.manifest.get("statistics", {})

    def of_tokens(self, name: str, start: int, stop: int) -> np.ndarray:
        """The entries (stop − start,) of a per-token column for the tokens `start` to `stop` of the token store.

        Raises: Damaged, also if a token id is outside the vocabulary."""
        values = self._read(name, self._first_token, start, stop)
        if (
            name == "ids"
            and self.vocab_size is not None
            and len(values)
            and (most := int(values.max())) >= self.vocab_size
        ):
            part = self.parts[bisect_right(self._first_token, start + int(values.argmax())) - 1]
            raise Damaged(
                self.folder,
                f"{part.name} has the token {most}, outside model.vocab_size={self.vocab_size}",
            )
        return values

    def of_documents(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The entries of a per-document column for the documents `start` to `stop`. Raises: Damaged.

        The shape is (documents,), or (documents, width) if the column has more than one number per document."""
        return self._read(name, self._first_document, start, self.documents if stop is None else stop)

    @property
    def ends(self) -> np.ndarray:
        """The index of the token after each document, (documents,) int64. Raises: Damaged."""
        ends = np.cumsum(self.of_documents("lengths"), dtype=np.int64)
        if self.documents and ends[-1] != self.tokens:
            raise Damaged(self.folder, f"its documents have {ends[-1]:,} tokens, its parts {self.tokens:,}")
        return ends

    def columns_of(self, number: int) -> Mapping[str, Column]:
        """The columns in the folder of a part."""
        return COLUMNS if self.parts[number].elsewhere else self.columns

    def size_of(self, number: int, name: str) -> int:
        """The size in bytes of the column `name` of a part."""
        part, column = self.parts[number], self.columns_of(number)[name]
        return column.itemsize * (part.tokens if column.per_token else part.documents)

    def _look_at(self, number: int) -> dict[str, str]:
        """Check the sizes of a part's files, and return the checksums of its blocks by column. Raises: Damaged.

        The result is empty if the part has no checksums."""
        part, columns = self.parts[number], self.columns_of(number)
        if part.elsewhere:
            check_file(part.elsewhere)
        for name in columns:
            size, path = self.size_of(number, name), f"{part.name}/{name}.bin"
            try:
                found = (self.folder / path).stat().st_size
            except OSError as error:
                raise Damaged(self.folder, f"{path} cannot be read ({error.strerror})") from error
            if found != size:
                raise Damaged(self.folder, f"{path} has {found:,} bytes instead of {size:,}")
        if part.checksum is None:
            return {}
        blocks = read_part(self.folder, part.name, part.checksum)[0].get("blocks")
        if not isinstance(blocks, dict) or not all(isinstance(blocks.get(name), str) for name in columns):
            raise Damaged(self.folder, f"{part.name}/{META} lacks checksums")
        return blocks

    def _read(self, name: str, firsts: list[int], start: int, stop: int) -> np.ndarray:
        column, pieces = self.columns[name], []
        number = bisect_right(firsts, start) - 1
        while start < stop:
            end = min(stop, firsts[number + 1])
            if start < end:
                first, last = (index - firsts[number] for index in (start, end))
                if column.per_token and self.parts[number].elsewhere:
                    pieces.append(self._ids_elsewhere(number, first, last))
                else:
                    pieces.append(self._entries(number, name, column, first, last))
                start = end
            number += 1
        values = pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, column.dtype)])
        return values if column.width == 1 else values.reshape(-1, column.width)

    def _entries(self, number: int, name: str, column: Column, first: int, last: int) -> np.ndarray:
        """The entries `first` to `last` of a column of a part."""
        read = self.bytes_of(number, name, first * column.itemsize, last * column.itemsize)
        return np.frombuffer(read, column.dtype)

    def _ends_in(self, number: int) -> np.ndarray:
        """The number of tokens up to and including each document of a part, (documents,) int64. Raises: Damaged."""
        part = self.parts[number]
        ends = np.cumsum(self._entries(number, "lengths", COLUMNS["lengths"], 0, part.documents), dtype=np.int64)
        if part.documents and ends[-1] != part.tokens:
            raise Damaged(self.folder, f"the documents of {part.name} have {ends[-1]:,} tokens, not {part.tokens:,}")
        return ends

    def _ids_elsewhere(self, number: int, first: int, last: int) -> np.ndarray:
        """The tokens `first` to `last` of a part whose ids are elsewhere. Raises: UserError."""
        elsewhere, dtype, ends = self.parts[number].elsewhere, self.columns["ids"].dtype, self._laid_out(number)
        assert elsewhere is not None
        low, high = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last - 1, "right")) + 1
        columns = {name: self._entries(number, name, column, low, high) for name, column in COLUMNS.items()}
        spans = Spans(**columns, begins=ends[low:high] - columns["lengths"])
        below = min(self.vocab_size or np.iinfo(dtype).max + 1, np.iinfo(dtype).max + 1)
        return read_ids(self.folder, elsewhere, spans, first, last, below).astype(dtype)

    def bytes_of(self, number: int, name: str, first: int, last: int) -> bytes:
        """The bytes `first` to `last` of the column `name` of a part. Raises: Damaged, if a checksum differs."""
        checksums, path = self._known(number).get(name), f"{self.parts[number].name}/{name}.bin"
        start, stop = (first, last) if checksums is None else (first // BLOCK * BLOCK, -(-last // BLOCK) * BLOCK)
        try:
            with open(self.folder / path, "rb") as file:
                file.seek(start)
                read = file.read(stop - start)
        except OSError as error:
            raise Damaged(self.folder, f"{path} cannot be read ({error.strerror})") from error
        if len(read) < last - start:
            raise Damaged(self.folder, f"{path} ends early")
        if checksums is not None and (wrong := first_wrong(read, checksums, start // BLOCK)) is not None:
            raise Damaged(self.folder, f"{path} differs from its checksum at byte {wrong * BLOCK:,} or after it")
        return read[first - start : last - start]
