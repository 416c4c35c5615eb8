"""Finds the documents in files of token ids, and applies the rule of document ends.

The rule: exactly one end-of-text token follows each document. An end that a document has at its start or end already
is not doubled. A flat file is one sequence: ends at its start are left out, and an end follows its last token. Its
documents are found only where they are needed, for which the file is read.

Files of up to `COMPLETE` bytes are read completely when they are prepared. Of larger files, `PLACES` places are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from opt_parallel.data.ids.formats import IdFile

COMPLETE = 1 << 28  # bytes of a file that is read completely
PLACES, PLACE = 1024, 1 << 15  # number of places that are read of a larger file, and number of ids in each of them
PIECE_BYTES = 1 << 28  # bytes of a piece, which becomes a part of the token store, whose files are fsynced
CHUNK = 1 << 22  # number of ids that are read at a time
ASKED = 256  # number of documents of a piece of a larger file that show whether documents have ends

Spans = tuple[np.ndarray, np.ndarray]  # the first token of each document and the token after it, int64


def pieces_of(file: IdFile) -> list[tuple[int, int, int]]:
    """Ranges of documents, or of ids of a flat file, each with its approximate number of bytes."""
    entries = file.tokens if file.documents is None else file.documents
    step = -(-entries // -(-file.size // PIECE_BYTES))
    starts = range(0, entries, step)
    return [(start, min(start + step, entries), file.size // len(starts)) for start in starts]


def documents(file: IdFile, first: int, last: int, end: int) -> Iterator[Spans]:
    """The documents of a piece, without ends and without empty documents. Of a flat file, the documents that start
    in the piece. Raises: UserError."""
    spans = _flat(file, first, last, end) if file.documents is None else _indexed(file, first, last)
    for starts, stops in spans:
        if len(starts):
            base = int(starts[0])
            ids = file.read(base, int(stops[-1]))
            yield _trimmed(starts, stops, end, lambda positions: ids[positions - base])  # noqa: B023 (used at once)


def sequences(file: IdFile, first: int, last: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents of a piece, or the piece of a flat file as one sequence, without reading all of a large file.

    The third array is 1 where an end is to be added after the tokens. Raises: UserError."""
    if file.documents is None:
        return _piece_of_flat(file, first, last, end)
    if file.size > COMPLETE and (found := _by_sample(file, *file.bounds(first, last), end)):
        return found
    spans = [*documents(file, first, last, end)] or [(np.zeros(0, np.int64),) * 2]
    starts, stops = (np.concatenate(arrays) for arrays in zip(*spans, strict=True))
    return starts, stops, np.ones(len(starts), np.uint8)


def looked_at(file: IdFile, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """The ids among `start` to `stop` that are read when a file is prepared, each array with its first position."""
    if file.size <= COMPLETE:
        places = [(position, min(position + CHUNK, stop)) for position in range(start, stop, CHUNK)]
    else:
        step = file.tokens // PLACES
        every = range(-(-start // step) * step, stop, step)
        places = [(position, min(position + PLACE, stop)) for position in every]
    for place in places:
        yield place[0], file.read(*place)


def _flat(file: IdFile, first: int, last: int, end: int) -> Iterator[Spans]:
    """The documents between the ends of a flat file that start in a piece, chunk by chunk."""
    begin, position = (0, 0) if first == 0 else (None, first - 1)
    while position < file.tokens and (begin is None or begin < last):
        ids = file.read(position, min(position + CHUNK, file.tokens))
        ends = np.nonzero(ids == end)[0] + position
        position += len(ids)
        if begin is None and len(ends):
            begin, ends = int(ends[0]) + 1, ends[1:]
        if begin is not None and position == file.tokens:
            ends = np.append(ends, file.tokens)
        if begin is None or not len(ends):
            if begin is None and position > last:
                return
            continue
        starts = np.concatenate([[begin], ends[:-1] + 1])
        kept = (starts < last) & (ends > starts)
        yield starts[kept], ends[kept]
        begin = int(ends[-1]) + 1


def _indexed(file: IdFile, first: int, last: int) -> Iterator[Spans]:
    """The documents `first` to `last` of the index, in groups of about `CHUNK` ids."""
    starts, stops = file.bounds(first, last)
    start = 0
    while start < len(starts):
        stop = max(start + 1, int(np.searchsorted(stops, starts[start] + CHUNK, "right")))
        yield starts[start:stop].copy(), stops[start:stop].copy()
        start = stop


def _trimmed(starts: np.ndarray, stops: np.ndarray, end: int, at: Callable[[np.ndarray], np.ndarray]) -> Spans:
    """The documents without ends at their start and end, and without empty documents."""
    while True:
        full = stops > starts
        starts, stops = starts[full], stops[full]
        before, after = at(starts) == end, at(stops - 1) == end
        if not (before.any() or after.any()):
            return starts, stops
        starts, stops = starts + before, stops - after


def _piece_of_flat(file: IdFile, first: int, last: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start = first
    while first == 0 and start < last and file.read(start, start + 1)[0] == end:
        start += 1
    added = last == file.tokens and file.read(last - 1, last)[0] != end
    found = np.array([start] if start < last else [], np.int64)
    return found, np.full_like(found, last), np.full(len(found), added, np.uint8)


def _by_sample(
    file: IdFile, starts: np.ndarray, stops: np.ndarray, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The documents of a piece of a large file, some of which show whether documents have ends at their start and end.

    The result is None if these documents differ, so that all must be read."""
    full = stops > starts
    starts, stops = starts[full], stops[full]
    some = np.unique(np.linspace(0, len(starts) - 1, min(ASKED, len(starts))).astype(np.int64))
    before, after = file.at(starts[some]) == end, file.at(stops[some] - 1) == end
    if before.any() != before.all() or after.any() != after.all() or not len(some):
        return None
    starts = starts + before.all()
    kept = stops > starts
    return starts[kept], stops[kept], np.full(int(kept.sum()), not after.all(), np.uint8)
