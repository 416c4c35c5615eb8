"""Writes token ids in the formats of other programs, as these programs document them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

Documents = Sequence[Sequence[int]]
MEGATRON = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}  # codes of the types


def megatron(path: Path, documents: Documents, dtype: str = "uint16", end: int | None = None, cut: int = 0) -> Path:
    """Megatron-LM's pair of `path`, a .bin, and its .idx. Without `end`, no end follows a document.

    With `cut`, a document consists of sequences of at most this length."""
    documents = [[*ids, *([] if end is None else [end])] for ids in documents]
    steps = [cut or len(ids) or 1 for ids in documents]
    pieces = [
        [ids[start : start + step] for start in range(0, max(len(ids), 1), step)]
        for ids, step in zip(documents, steps, strict=True)
    ]
    lengths = np.array([len(piece) for each in pieces for piece in each], "<i4")
    starts = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    first = np.cumsum([0, *(len(each) for each in pieces)], dtype="<i8")
    path.write_bytes(flattened(documents, dtype))
    head = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([MEGATRON[dtype]])
    counts = np.array([len(lengths), len(first)], "<u8").tobytes()
    path.with_suffix(".idx").write_bytes(head + counts + lengths.tobytes() + starts.tobytes() + first.tobytes())
    return path


def flat(path: Path, documents: Documents, end: int, dtype: str = "uint16") -> Path:
    """nanoGPT's .bin, and OLMo's .npy without header: an end follows each document."""
    path.write_bytes(flattened([[*ids, end] for ids in documents], dtype))
    return path


def llm_c(path: Path, documents: Documents, end: int, dtype: str = "uint16") -> Path:
    """llm.c's .bin with its header of 256 int32: each document begins with an end."""
    ids = flattened([[end, *each] for each in documents], dtype)
    header = np.zeros(256, "<i4")
    header[:3] = [20240520, 1, len(ids) // 2] if dtype == "uint16" else [20240801, 7, len(ids) // 4]
    path.write_bytes(header.tobytes() + ids)
    return path


def numpy(path: Path, documents: Documents, end: int, dtype: str = "uint16") -> Path:
    """NumPy's .npy with its header: an end follows each document."""
    np.save(path, np.frombuffer(flattened([[*ids, end] for ids in documents], dtype), dtype))
    return path


def datatrove(path: Path, documents: Documents, end: int | None = None, dtype: str = "uint16") -> Path:
    """datatrove's .ds with its .ds.index."""
    documents = [[*ids, *([] if end is None else [end])] for ids in documents]
    path.write_bytes(flattened(documents, dtype))
    Path(f"{path}.index").write_bytes(np.cumsum([len(ids) for ids in documents], dtype="<u8").tobytes())
    return path


def flattened(documents: Documents, dtype: str) -> bytes:
    return np.array([token for ids in documents for token in ids], dtype).tobytes()
