"""The token store: what preparation writes and training reads, a folder of flat binary arrays in parts.

    store.json            the columns, the parts in order, what was counted
    part-00000/ids.bin    token ids of all the part's documents, end to end, in the smallest type that holds them
    part-00000/lengths.bin, …   one entry a document; further columns hold entries a token or a document

Parts follow each other in the order of the text, and rows of tokens are cut across them, so a store knows nothing of
sequence lengths. Files are read at the places that are asked for, never mapped or read whole: memory does not grow with
the text.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from opt_parallel.errors import UserError
from opt_parallel.storage.atomic import write_text

MANIFEST = "store.json"
FORMAT = 1


@dataclass(frozen=True)
class Column:
    """Arrays of one name: `dtype` as NumPy names it, `width` numbers for each token or each document."""

    dtype: str
    per_token: bool = False
    width: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return np.dtype(self.dtype).itemsize * self.width


LENGTHS = Column("uint32")  # tokens of each document


def ids_column(tokens: int) -> Column:
    """The column of ids below `tokens`, in the smallest type that holds them."""
    return Column(str(np.min_scalar_type(tokens - 1)), per_token=True)


@dataclass(frozen=True)
class Part:
    """A stretch of whole documents."""

    name: str
    documents: int
    tokens: int


@dataclass
class Encoded:
    """Some documents in arrays: `ids` (tokens,), `lengths` (documents,) and the encoder's own columns; `counts` says
    in words what was left out or cut; `text_bytes` of the documents in UTF-8, where the encoder counts them."""

    columns: dict[str, np.ndarray]
    counts: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0


class PartWriter:
    """Writes one part, a batch of documents at a time."""

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        self.folder, self.columns = folder, columns
        self.documents = self.tokens = 0
        self.counts: Counter[str] = Counter()
        folder.mkdir(parents=True)
        self.files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in columns}

    def write(self, encoded: Encoded) -> None:
        """Append documents."""
        lengths = encoded.columns["lengths"]
        for name, column in self.columns.items():
            values = encoded.columns[name].astype(column.dtype)
            assert values.size == column.width * (int(lengths.sum()) if column.per_token else len(lengths))
            self.files[name].write(values.tobytes())
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.counts += encoded.counts

    def close(self) -> Part:
        """Finish the files."""
        for file in self.files.values():
            file.close()
        return Part(self.folder.name, self.documents, self.tokens)


def write_manifest(
    folder: Path, columns: Mapping[str, Column], parts: Iterable[Part], counts: Mapping[str, int], **more: Any
) -> None:
    """store.json: what makes the parts a store. `more` is whatever else is worth knowing."""
    content = {
        "format": FORMAT,
        "columns": {name: asdict(column) for name, column in columns.items()},
        "parts": [asdict(part) for part in parts],
        "counts": dict(counts),
        **more,
    }
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


class TokenStore:
    """A store's documents and tokens by number."""

    def __init__(self, folder: Path | str) -> None:
        """Raises: UserError if `folder` holds no whole store."""
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.columns = {name: Column(**column) for name, column in self.manifest["columns"].items()}
            self.parts = [Part(**part) for part in self.manifest["parts"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder} is no token store ({error}): remove it, and it is made anew") from error
        self._first_token = list(accumulate((part.tokens for part in self.parts), initial=0))
        self._first_document = list(accumulate((part.documents for part in self.parts), initial=0))

    @property
    def tokens(self) -> int:
        return self._first_token[-1]

    @property
    def documents(self) -> int:
        return self._first_document[-1]

    @property
    def counts(self) -> dict[str, int]:
        """What was left out or cut, in words."""
        return self.manifest["counts"]

    def of_tokens(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries of tokens `start` to `stop` of the store, of a column that has one for each: (stop − start,)."""
        return self._read(name, self._first_token, start, stop)

    def of_documents(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Entries of documents `start` to `stop`: (documents,), or (documents, width) where the width is not 1."""
        return self._read(name, self._first_document, start, self.documents if stop is None else stop)

    def _read(self, name: str, firsts: list[int], start: int, stop: int) -> np.ndarray:
        column, pieces = self.columns[name], []
        number = bisect_right(firsts, start) - 1
        while start < stop:
            end = min(stop, firsts[number + 1])
            if start < end:
                path = self.folder / self.parts[number].name / f"{name}.bin"
                offset, count = (start - firsts[number]) * column.itemsize, (end - start) * column.width
                pieces.append(np.fromfile(path, column.dtype, count, offset=offset))
                if len(pieces[-1]) != count:
                    raise UserError(f"{path} ends early: remove {self.folder}, and it is made anew")
                start = end
            number += 1
        values = pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, column.dtype)])
        return values if column.width == 1 else values.reshape(-1, column.width)
