"""Compares all bytes of a token store with their checksums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from opt_parallel.data.store.blocks import BLOCK, checksums_of
from opt_parallel.data.store.parts import TOKEN_COUNTS
from opt_parallel.data.store.store import META, Damaged, TokenStore, read_part
from opt_parallel.data.store.workers import progress

NAMED = 10  # Maximum number of damaged parts that the message names.
CHUNK = 1024 * BLOCK  # Number of bytes that are read at a time.


def verify(key: str, store: TokenStore) -> str:
    """Check every byte of a token store, and return a summary in one line.

    `key` is the configuration key of the store's text, for messages. Raises: Damaged, which names the damaged parts."""
    wrong: list[str] = []
    size = sum(store.size_of(number, name) for number in range(len(store.parts)) for name in store.columns_of(number))
    with progress(f"{key}: comparing", size) as report:
        for number in range(len(store.parts)):
            try:
                for done in _compare(store, number):
                    report(done)
            except Damaged as error:
                wrong.append(error.what)
    if wrong:
        more = [f"and {len(wrong) - NAMED} more parts"] if len(wrong) > NAMED else []
        raise Damaged(store.folder, "; ".join([*wrong[:NAMED], *more]))
    summary = f"{key}: {len(store.parts):,} parts of {size / 1e6:,.1f} MB in {store.folder} are undamaged"
    unknown = sum(part.checksum is None for part in store.parts)
    return f"{summary}; of {unknown:,} parts without checksums, only the sizes were compared" if unknown else summary


def _compare(store: TokenStore, number: int) -> Iterator[int]:
    """Compare a part with its checksums, and yield the number of compared bytes after each chunk. Raises: Damaged."""
    part = store.parts[number]
    lengths = most = 0
    for name, column in store.columns_of(number).items():
        size, chunk = store.size_of(number, name), CHUNK // column.itemsize * column.itemsize
        for first in range(0, size, chunk):
            read = store.bytes_of(number, name, first, min(first + chunk, size))
            values = np.frombuffer(read, column.dtype)
            if name == "lengths":
                lengths += int(values.sum(dtype=np.uint64))
            if name == "ids":
                most = max(most, int(values.max()))
            yield len(read)
    if part.elsewhere:
        start = sum(each.tokens for each in store.parts[:number])
        for first in range(start, start + part.tokens, CHUNK // 8):
            store.of_tokens("ids", first, min(first + CHUNK // 8, start + part.tokens))
    if lengths != part.tokens:
        raise Damaged(store.folder, f"{part.name} has {part.tokens:,} tokens, but its documents have {lengths:,}")
    if store.vocab_size is not None and most >= store.vocab_size:
        raise Damaged(store.folder, f"{part.name} has the token {most}, outside model.vocab_size={store.vocab_size}")
    if part.checksum is None:
        return
    content, _ = read_part(store.folder, part.name, part.checksum)
    try:
        found = checksums_of(store.folder / part.name / TOKEN_COUNTS)
    except OSError as error:
        raise Damaged(store.folder, f"{part.name}/{TOKEN_COUNTS} cannot be read ({error.strerror})") from error
    if content.get(TOKEN_COUNTS) != found:
        raise Damaged(store.folder, f"{part.name}/{TOKEN_COUNTS} differs from its checksum in {META}")
