"""Opens files of token ids, and names what is wrong with them.

| file | written by | its documents |
|---|---|---|
| `.bin` with an `.idx` beside it | Megatron-LM (`MMIDIDX`, version 1), any integer type | in the index |
| `.bin` with a header of 256 int32 | llm.c: GPT-2's ids in uint16, Llama 3's in uint32 | begin with the end |
| `.bin` without header | nanoGPT, uint16 | end with the end |
| `.npy` with or without NumPy's header | NumPy, OLMo | end with the end |
| `.ds` with a `.ds.index` beside it | datatrove, 2 or 4 bytes for an id | in the index |

The end is the end-of-text token. The formats without an index are *flat*: a file is one sequence of ids.

Sources: `indexed_dataset.py` of megatron-core,
`dataloader.h` and `data_common.py` of llm.c, `prepare.py` of nanoGPT, `tokenizer.py` of datatrove.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opt_parallel.config.data import TYPES
from opt_parallel.config.model import require
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import check_fetched

ENDINGS = (".bin", ".npy", ".ds")  # endings of the files that contain ids
PARTNERS = (".idx", ".index", ".metadata")  # endings of the files beside them
USUAL = "uint16"  # the type of a file without header, unless `data.dtype` is set
MEGATRON, MEGATRON_HEADER = b"MMIDIDX\x00\x00", 34
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LLM_C, LLM_C_HEADER = {20240520: (1, "uint16"), 20240801: (7, "uint32")}, 1024  # version and type by the magic number
NUMPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
LOOKED_AT = 1 << 16  # ids at the start of a file that show its type


@dataclass(frozen=True)
class IdFile:
    """A file of `tokens` ids of NumPy's type `dtype`, which start at byte `offset`.

    `documents` is the number of documents in the `index`, or None for a flat file. `kind` describes the format in
    messages, and `where` names the file and its configuration key."""

    path: Path
    where: str
    kind: str
    dtype: str
    offset: int
    tokens: int
    index: Path | None = None
    documents: int | None = None
    sequences: int = 0  # in Megatron's index, whose documents consist of one or more sequences

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def size(self) -> int:
        """The number of bytes of the ids."""
        return self.tokens * self.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids `start` to `stop` of the file, as (stop − start,) int64. Raises: UserError."""
        try:
            ids = np.fromfile(self.path, self.dtype, stop - start, offset=self.offset + start * self.itemsize)
        except OSError as error:
            raise UserError(f"{self.where} cannot be read ({one_line(error)}): restore the file") from error
        require(len(ids) == stop - start, f"{self.where} ends early: copy the file again")
        return ids.astype(np.int64)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The ids at some positions of the file, as (positions,) int64. Raises: UserError."""
        item = self.itemsize
        try:
            with self.path.open("rb") as file:
                places = (positions * item + self.offset).tolist()
                read = b"".join(os.pread(file.fileno(), item, place) for place in places)
        except OSError as error:
            raise UserError(f"{self.where} cannot be read ({one_line(error)}): restore the file") from error
        require(len(read) == len(positions) * item, f"{self.where} ends early: copy the file again")
        return np.frombuffer(read, self.dtype).astype(np.int64)

    def bounds(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The first token and the token after the last one of the documents `first` to `last` of the index.

        The arrays are (last − first,) int64. Raises: UserError if the index contradicts itself or the file."""
        assert self.index is not None
        assert self.documents is not None
        cuts = self._megatron_cuts(first, last) if self.sequences else self._datatrove_cuts(first, last)
        inside = cuts[0] >= 0 and cuts[-1] <= self.tokens and bool((np.diff(cuts) >= 0).all())
        whole = (first > 0 or cuts[0] == 0) and (last < self.documents or cuts[-1] == self.tokens)
        require(
            inside and whole,
            f"{self.where}: {self.index.name} points outside the {self.tokens:,} ids of {self.path.name}, or leaves "
            "some out: copy both files again",
        )
        return cuts[:-1], cuts[1:]

    def _datatrove_cuts(self, first: int, last: int) -> np.ndarray:
        ends = self._entries("<u8", 0, max(first - 1, 0), last)
        return np.concatenate([[0], ends]) if first == 0 else ends

    def _megatron_cuts(self, first: int, last: int) -> np.ndarray:
        """The boundaries of documents, from those of their sequences, whose lengths and positions must agree."""
        assert self.documents is not None
        lengths, pointers = MEGATRON_HEADER, MEGATRON_HEADER + 4 * self.sequences
        numbers = self._entries("<i8", pointers + 8 * self.sequences, first, last + 1)
        low, high = int(numbers[0]), int(numbers[-1])
        require(
            0 <= low <= high <= self.sequences and bool((np.diff(numbers) >= 0).all()),
            f"{self.where}: {self._named} names sequences that do not exist: copy both files again",
        )
        starts = self._entries("<i8", pointers, low, min(high + 1, self.sequences))
        if high == self.sequences:
            starts = np.append(starts, self.size)
        cuts, rest = np.divmod(starts, self.itemsize)
        require(
            not rest.any() and bool((np.diff(cuts) == self._entries("<i4", lengths, low, high)).all()),
            f"{self.where}: the positions of the sequences in {self._named} contradict their lengths, or do not follow "
            "each other: copy both files again, or write them again",
        )
        return cuts[numbers - low]

    @property
    def _named(self) -> str:
        return self.index.name if self.index else ""

    def _entries(self, dtype: str, offset: int, first: int, last: int) -> np.ndarray:
        """Entries of an array in the index, as int64. Raises: UserError."""
        assert self.index is not None
        size = np.dtype(dtype).itemsize
        try:
            found = np.fromfile(self.index, dtype, last - first, offset=offset + first * size)
        except OSError as error:
            raise UserError(f"{self.where}: {self._named} cannot be read ({one_line(error)}): restore it") from error
        require(len(found) == last - first, f"{self.where}: {self._named} ends early: copy the file again")
        return found.astype(np.int64, copy=False)


def is_ids(path: Path) -> bool:
    """Whether a file has the ending of a file of ids."""
    return path.suffix.lower() in ENDINGS


def is_ids_or_index(path: Path) -> bool:
    return path.suffix.lower() in (*ENDINGS, *PARTNERS)


def partners_of(path: Path) -> list[Path]:
    """The files beside a file of ids that belong to it, as far as they exist."""
    every = [_beside(path, ".idx")] if path.suffix.lower() == ".bin" else []
    if path.suffix.lower() == ".ds":
        every = [Path(f"{path}.index"), Path(f"{path}.metadata")]
    return [each for each in every if each.is_file()]


def data_file_of(path: Path, where: str) -> Path:
    """The file of ids that `path` names, which may be its index. Raises: UserError if the file is missing."""
    ending = path.suffix.lower()
    if ending not in PARTNERS:
        return path
    data = _beside(path, ".bin") if ending == ".idx" else path.with_suffix("")
    require(data.is_file(), f"{where} is an index, and its ids are missing: copy {data.name} beside it")
    return data


def _beside(path: Path, ending: str) -> Path:
    """The path with another ending, in upper case if only that file exists."""
    upper = path.with_suffix(ending.upper())
    return upper if upper.is_file() and not path.with_suffix(ending).is_file() else path.with_suffix(ending)


def open_ids(path: Path, where: str, dtype: str | None = None) -> IdFile:
    """Open a file of ids, and its index. `dtype` is the type of a file without header. Raises: UserError.

    Only the sizes and headers are checked; `IdFile.bounds` checks the index."""
    try:
        check_fetched(path, where)
        size = path.stat().st_size
        require(size > 0, f"{where} is empty: name a file with token ids")
        with path.open("rb") as file:
            head = file.read(LLM_C_HEADER)
        if path.suffix.lower() == ".ds":
            return _datatrove(path, where, size)
        if path.suffix.lower() == ".npy" and head.startswith(NUMPY):
            return _numpy(path, where, size)
        return _bin(path, where, size, head, dtype)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({one_line(error)}): restore the file") from error


def _bin(path: Path, where: str, size: int, head: bytes, dtype: str | None) -> IdFile:
    """A file with an index of Megatron, with the header of llm.c, or without both. `dtype` chooses the latter."""
    index = _beside(path, ".idx")
    words = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    has_index, has_header = path.suffix.lower() == ".bin" and index.is_file(), len(words) > 2 and words[0] in LLM_C
    if dtype is None and has_index:
        require(
            not has_header,
            f"{where} has an index of Megatron, {index.name}, and a header of llm.c: move {index.name} away to read it "
            f"as llm.c's, or set data.dtype={LLM_C.get(int(words[0]) if has_header else 0, (0, USUAL))[1]} to read it "
            "without index and header",
        )
        return _megatron(path, index, where, size)
    if dtype is None and has_header:
        return _llm_c(path, where, size, words)
    require(not head.startswith(ZIP), f"{where} is a zip archive, such as PyTorch's, and not ids: name another file")
    kind = dtype or USUAL
    item = np.dtype(kind).itemsize
    require(
        size % item == 0,
        f"{where} has {size:,} bytes, which is no multiple of the {item} bytes of {kind}: copy the file again, or set "
        "data.dtype to the type of its ids",
    )
    found = IdFile(path, where, f"{kind} without header", kind, 0, size // item)
    _check_type(found, dtype)
    return found


def _check_type(file: IdFile, dtype: str | None) -> None:
    """Raise UserError if a file without header was written in a larger type than the usual one."""
    ids = file.read(0, min(file.tokens, LOOKED_AT)) if dtype is None else np.zeros(0, np.int64)
    for words, wider in ((4, "uint64"), (2, "uint32")):
        cut = ids[: len(ids) // words * words].reshape(-1, words)
        if len(cut) > 1 and not cut[:, 1:].any() and cut[:, 0].any():
            raise UserError(
                f"{file.where} has no header, and read as {USUAL}, every id is followed by {words - 1} zeros, as in a "
                f"file of {wider}: set data.dtype={wider}, or data.dtype={USUAL} if the zeros are ids"
            )


def _llm_c(path: Path, where: str, size: int, words: np.ndarray) -> IdFile:
    version, dtype = LLM_C[int(words[0])]
    require(
        words[1] == version,
        f"{where} has a header of llm.c (magic number {words[0]}) of version {words[1]}, but version {version} is "
        f"read: write the file again, or set data.dtype={dtype} if this is no header",
    )
    item, tokens = np.dtype(dtype).itemsize, int(words[2])
    require(
        size == LLM_C_HEADER + tokens * item,
        f"{where} has {size:,} bytes instead of the {LLM_C_HEADER + tokens * item:,} of its header ({tokens:,} ids of "
        f"{dtype}): copy the file again, or set data.dtype={dtype} if this is no header",
    )
    require(tokens > 0, f"{where} is empty: name a file with token ids")
    return IdFile(path, where, "llm.c", dtype, LLM_C_HEADER, tokens)


def _numpy(path: Path, where: str, size: int) -> IdFile:
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, column_major, dtype = read(file)
            offset = file.tell()
    except ValueError as error:
        raise UserError(f"{where} has a damaged header ({one_line(error):.200}): write it with np.save") from error
    require(min(shape, default=0) >= 0, f"{where} has a damaged header (its shape is {shape}): write it with np.save")
    require(
        dtype.name in TYPES and dtype.byteorder != ">" and not (column_major and len(shape) > 1),
        f"{where} is an array of {dtype}{' in Fortran order' if column_major else ''}: write ids as integers in C "
        "order, such as np.save(path, ids.astype('uint16'))",
    )
    tokens = int(np.prod(shape, dtype=np.int64))
    require(tokens > 0, f"{where} is empty: name a file with token ids")
    require(
        size == offset + tokens * dtype.itemsize,
        f"{where} has {size:,} bytes instead of the {offset + tokens * dtype.itemsize:,} of its header: copy the file "
        "again",
    )
    return IdFile(path, where, "NumPy", dtype.name, offset, tokens)


def _megatron(path: Path, index: Path, where: str, size: int) -> IdFile:
    named, found = index.name, index.stat().st_size
    with index.open("rb") as file:
        head = file.read(MEGATRON_HEADER)
    require(
        head.startswith(MEGATRON) and len(head) == MEGATRON_HEADER,
        f"{where}: {named} is no index of Megatron-LM, because it does not start with MMIDIDX: write it again with "
        "Megatron's tools, or set data.dtype to read the ids without it",
    )
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    sequences, entries = (int.from_bytes(head[start : start + 8], "little") for start in (18, 26))
    require(version == 1, f"{where}: {named} has version {version}, but version 1 is read: write it again")
    require(
        code in MEGATRON_TYPES,
        f"{where}: {named} names the type {code}, which is no integer type ({', '.join(map(str, MEGATRON_TYPES))} "
        "are): write the ids as integers",
    )
    dtype = MEGATRON_TYPES[code]
    expected = MEGATRON_HEADER + 12 * sequences + 8 * entries
    require(
        found in (expected, expected + sequences),  # a file for several modes has one more byte for each sequence
        f"{where}: {named} has {found:,} bytes instead of {expected:,}: copy the file again",
    )
    item = np.dtype(dtype).itemsize
    require(sequences > 0 and entries > 1, f"{where}: {named} has no documents: name a file with token ids")
    last = MEGATRON_HEADER + 4 * sequences
    length = int(np.fromfile(index, "<i4", 1, offset=last - 4)[0])
    end = int(np.fromfile(index, "<i8", 1, offset=last + 8 * (sequences - 1))[0]) + length * item
    require(
        end == size,
        f"{where}: {named} describes {end:,} bytes of {dtype}, but {path.name} has {size:,}: copy both files again",
    )
    return IdFile(path, where, "Megatron-LM", dtype, 0, size // item, index, entries - 1, sequences)


def _datatrove(path: Path, where: str, size: int) -> IdFile:
    index = Path(f"{path}.index")
    require(index.is_file(), f"{where} needs its index: copy {index.name} beside it")
    require(
        not Path(f"{path}.loss").exists(),
        f"{where}: {path.name}.loss leaves tokens out of the loss, which is not read: write the ids without it, or "
        "move it away to train on all tokens",
    )
    documents, rest = divmod(index.stat().st_size, 8)
    require(rest == 0 and documents > 0, f"{where}: {index.name} is no list of int64: copy the file again")
    tokens = int(np.fromfile(index, "<u8", 1, offset=8 * (documents - 1))[0])
    dtype = next((each for each in ("uint16", "uint32") if tokens * np.dtype(each).itemsize == size), None)
    if dtype is None:
        raise UserError(
            f"{where}: {index.name} counts {tokens:,} ids, which are {tokens * 2:,} or {tokens * 4:,} bytes, but "
            f"{path.name} has {size:,}: copy both files again"
        )
    require(tokens > 0, f"{where} is empty: name a file with token ids")
    return IdFile(path, where, "datatrove", dtype, 0, tokens, index, documents)
