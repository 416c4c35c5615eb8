"""Collects English text for first runs from Python's language reference and the standard library's docstrings."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from opt_parallel.storage.atomic import new_file

LEAST_CHARACTERS = 2000  # docstrings of a module are joined to documents of at least this many characters
VALIDATION_PERCENT = 5
SHINGLE_WORDS = 8
NEAR_DUPLICATE = 0.3  # a document is a near-duplicate if this share of its shingles occurs in the training text
NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_documents() -> Iterator[str]:
    """The topics of Python's language reference, and the docstrings of the standard library.

    The docstrings of a module are joined to longer documents. Modules are parsed in a fixed order, and not imported."""
    from pydoc_data.topics import topics

    yield from (topics[name].rstrip() for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for folder, below, files in os.walk(library):
        below[:] = sorted(set(below) - NOT_LIBRARY)
        for name in sorted(files):
            if name.endswith(".py"):
                yield from _gather(_docstrings(Path(folder, name)))


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, and the names and docstrings of its classes and functions."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template for a code generator
        return
    pending: list[Documented] = [tree]
    while pending:
        node = pending.pop(0)
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"
        pending.extend(child for child in node.body if isinstance(child, Documented))


def _gather(texts: Iterable[str]) -> Iterator[str]:
    gathered = ""
    for text in texts:
        gathered = f"{gathered}\n\n{text}" if gathered else text
        if len(gathered) >= LEAST_CHARACTERS:
            yield gathered
            gathered = ""
    if len(gathered) >= LEAST_CHARACTERS // 10:
        yield gathered


def split(documents: Iterable[str]) -> tuple[list[str], list[str], int]:
    """The training documents, the validation documents, and the number of documents in neither split.

    A hash of the text selects the split, so all exact copies of a document are in the same split. Validation documents
    that nearly equal training documents are left out."""
    train: list[str] = []
    candidates: list[str] = []
    for document in documents:
        chosen = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 100 < VALIDATION_PERCENT
        (candidates if chosen else train).append(document)
    seen = {shingle for document in train for shingle in _shingles(document)}
    validation = [document for document in candidates if _overlap(document, seen) < NEAR_DUPLICATE]
    return train, validation, len(candidates) - len(validation)


def _overlap(document: str, seen: set[int]) -> float:
    """The share of the document's shingles (runs of words) that are in `seen`."""
    shingles = _shingles(document)
    return len(shingles & seen) / len(shingles)


def _shingles(document: str) -> set[int]:
    """The hashes of all runs of `SHINGLE_WORDS` words in a document, without case and punctuation."""
    words = re.findall(r"\w+", document.lower())
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {hash(tuple(words[start : start + SHINGLE_WORDS])) for start in starts}


def write_split(folder: Path, train: list[str], validation: list[str]) -> None:
    """Write train.jsonl and validation.jsonl into `folder`. Each file is written atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("validation", validation)):
        with new_file(folder / f"{name}.jsonl") as file:
            file.writelines((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode() for text in documents)
