"""Builds a part of a token store from a file of token ids: it finds the documents, and copies no ids."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from opt_parallel.data.encode.columns import Encoded
from opt_parallel.data.encode.numbering import mapped
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.ids.documents import documents, looked_at, sequences
from opt_parallel.data.ids.formats import IdFile, open_ids
from opt_parallel.data.store.elsewhere import Elsewhere, write_table
from opt_parallel.data.store.parts import PartMaker
from opt_parallel.data.store.recipe import Recipe, chosen
from opt_parallel.data.text.files import Piece, shown
from opt_parallel.data.text.records import Record


def locate(folder: Path, name: str, piece: Piece, recipe: Recipe, duplicates: set[int]) -> None:
    """Write the part `name` for a piece of a file of ids. Raises: UserError.

    The ids of a file of up to 256 MiB are all checked, and those of a larger file at some places."""
    encoder, corpus = recipe.encoder, recipe.corpus
    assert isinstance(encoder, TextEncoder)
    file = open_ids(piece.path, f"{corpus.key}: {shown(piece.path)}", corpus.ids.dtype)
    table = write_table(folder, encoder.table)
    size = file.path.stat().st_size
    elsewhere = Elsewhere(str(file.path), file.dtype, file.offset, size, encoder.end, table)
    maker = PartMaker(folder, name, encoder.columns, elsewhere)
    if recipe.selects:
        counts = _write_selected(maker, file, piece, recipe, duplicates)
    else:
        counts = Counter[str]()
        _write_all(maker, file, piece, encoder, corpus.ids.end)
    maker.finish(counts=counts)


def _write_all(maker: PartMaker, file: IdFile, piece: Piece, encoder: TextEncoder, end: int) -> None:
    starts, stops, ended = sequences(file, piece.start, piece.stop, end)
    first, last = piece.start, piece.stop
    if file.documents is not None:  # `sequences` has compared the complete index of the piece
        first = int(file.bounds(first, first + 1)[0][0])
        last = int(file.bounds(last - 1, last)[1][-1])
    seen = 0
    for _, ids in looked_at(file, first, last):
        maker.count(mapped(ids, file.where, encoder.tokens, encoder.table))
        seen += len(ids)
    _write(maker, starts, stops, ended)
    if seen == last - first:  # every id outside the documents ends one
        maker.count_more(encoder.end, int(ended.sum()) - (seen - int((stops - starts).sum())))
    if file.documents is None:
        maker.lengths.clear()  # the lengths of documents are not known


def _write_selected(maker: PartMaker, file: IdFile, piece: Piece, recipe: Recipe, duplicates: set[int]) -> Counter[str]:
    """Write the documents that the recipe selects, and return the numbers of other documents."""
    encoder, end, counts, number = recipe.encoder, recipe.corpus.ids.end, Counter[str](), 0
    assert isinstance(encoder, TextEncoder)
    for starts, stops in documents(file, piece.start, piece.stop, end):
        base = int(starts[0]) if len(starts) else 0
        ids = file.read(base, int(stops[-1])) if len(starts) else np.zeros(0, np.int64)
        known = mapped(ids, file.where, encoder.tokens, encoder.table)
        spans = [(start - base, stop - base) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        records = [Record(file.where, {encoder.text.field: ids[start:stop]}) for start, stop in spans]
        kept = chosen(records, recipe, duplicates, number, counts)
        number += len(records)
        _write(maker, starts[kept], stops[kept], np.ones(len(kept), np.uint8))
        maker.count(np.concatenate([np.zeros(0, np.int64), *(known[slice(*spans[index])] for index in kept)]))
        maker.count_more(encoder.end, len(kept))
    return counts


def _write(maker: PartMaker, starts: np.ndarray, stops: np.ndarray, ended: np.ndarray) -> None:
    maker.write(Encoded({"starts": starts, "lengths": stops - starts + ended, "ended": ended}))
