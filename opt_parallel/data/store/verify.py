"""A store read whole, and compared with its checksums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from opt_parallel.data.store.blocks import BLOCK, checksums_of
from opt_parallel.data.store.build import WORDS
from opt_parallel.data.store.store import META, Damaged, TokenStore, read_part
from opt_parallel.data.store.workers import progress

TOLD = 10  # damaged parts that are named
CHUNK = 1024 * BLOCK  # bytes read at a time


def verify(key: str, store: TokenStore) -> str:
    """What was compared, in a line. `key`: what the store is of, for messages.

    Raises: Damaged, which names the damaged parts."""
    wrong: list[str] = []
    size = sum(store.size_of(number, name) for number in range(len(store.parts)) for name in store.columns)
    with progress(f"{key}: comparing", size) as report:
        for number in range(len(store.parts)):
            try:
                for done in _compare(store, number):
                    report(done)
            except Damaged as error:
                wrong.append(error.what)
    if wrong:
        more = [f"and {len(wrong) - TOLD} more parts"] if len(wrong) > TOLD else []
        raise Damaged(store.folder, "; ".join([*wrong[:TOLD], *more]))
    said = f"{key}: {len(store.parts):,} parts of {size / 1e6:,.1f} MB in {store.folder} are as they were written"
    unknown = sum(part.checksum is None for part in store.parts)
    return f"{said}, by the sizes of {unknown:,}, which an earlier version made without checksums" if unknown else said


def _compare(store: TokenStore, number: int) -> Iterator[int]:
    """The bytes of a part that were compared, as they are. Raises: Damaged."""
    part = store.parts[number]
    lengths = most = 0
    for name, column in store.columns.items():
        size, whole = store.size_of(number, name), CHUNK // column.itemsize * column.itemsize
        for first in range(0, size, whole):
            read = store.bytes_of(number, name, first, min(first + whole, size))
            values = np.frombuffer(read, column.dtype)
            if name == "lengths":
                lengths += int(values.sum(dtype=np.uint64))
            if name == "ids":
                most = max(most, int(values.max()))
            yield len(read)
    if lengths != part.tokens:
        raise Damaged(store.folder, f"{part.name} has documents of {lengths:,} tokens, and {part.tokens:,} tokens")
    if store.words is not None and most >= store.words:
        raise Damaged(
            store.folder, f"{part.name} has the token {most}, beyond the {store.words:,} words of the network"
        )
    if part.checksum is None:
        return
    content, _ = read_part(store.folder, part.name, part.checksum)
    try:
        found = checksums_of(store.folder / part.name / WORDS)
    except OSError as error:
        raise Damaged(store.folder, f"{part.name}/{WORDS} cannot be read ({error.strerror})") from error
    if content.get(WORDS) != found:
        raise Damaged(store.folder, f"{part.name}/{WORDS} differs from its checksum in {META}")
