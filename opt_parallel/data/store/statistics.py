"""Computes and prints the statistics of a token store, which are written to store.json when the store is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.data.encode.columns import Column
from opt_parallel.data.store.parts import TOKEN_COUNTS, PartMeta, add_counts
from opt_parallel.data.store.store import TokenStore, write_manifest
from opt_parallel.data.text.records import LISTED

EXAMPLES, EXAMPLE_TOKENS = 3, 32


def finish_store(
    folder: Path, columns: Mapping[str, Column], metas: list[PartMeta], tokenizer: Tokenizer | None
) -> None:
    """Write store.json with the statistics of the token store, whose parts must be complete."""
    counts, lengths, token_counts = Counter[str](), Counter[int](), np.zeros(0, np.int64)
    for meta in metas:
        counts.update(meta.counts)
        lengths.update(meta.lengths)
        token_counts = add_counts(token_counts, np.load(folder / meta.part.name / TOKEN_COUNTS))
    statistics = {
        "documents": sum(meta.part.documents for meta in metas),
        "tokens": sum(meta.part.tokens for meta in metas),
        "text_bytes": sum(meta.text_bytes for meta in metas),
        "lengths": lengths_in_short(lengths),
        "unigram_entropy": entropy(token_counts),
        "bad_records": [line for meta in metas for line in meta.bad][:LISTED],
    }
    parts = [meta.part for meta in metas]
    write_manifest(folder, columns, parts, counts, statistics=statistics)
    if tokenizer is not None:
        statistics["examples"] = examples(TokenStore(folder), tokenizer)
        write_manifest(folder, columns, parts, counts, statistics=statistics)


def lengths_in_short(lengths: Mapping[int, int]) -> dict[str, float]:
    """The minimum, median, mean, 95th percentile and maximum of the documents' lengths in tokens.

    `lengths[n]` is the number of documents with n tokens."""
    if not lengths:
        return {}
    values = sorted(lengths)
    up_to = np.cumsum([lengths[value] for value in values])

    def quantile(share: float) -> int:
        return values[int(np.searchsorted(up_to, share * up_to[-1]))]

    mean = sum(value * count for value, count in lengths.items()) / int(up_to[-1])
    return {"min": values[0], "median": quantile(0.5), "mean": mean, "p95": quantile(0.95), "max": values[-1]}


def entropy(token_counts: np.ndarray) -> float:
    """The entropy (in nats) of the distribution of tokens with these counts."""
    share = token_counts[token_counts > 0] / max(token_counts.sum(), 1)
    return float(-(share * np.log(share)).sum())


def examples(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    """The text of the first tokens of some documents."""
    lengths = store.of_documents("lengths", 0, min(store.documents, EXAMPLES))
    starts = np.cumsum([0, *lengths.tolist()])
    pairs = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    beginnings = [store.of_tokens("ids", start, min(stop, start + EXAMPLE_TOKENS)) for start, stop in pairs]
    return [tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in beginnings]


def line_of(key: str, store: TokenStore) -> str:
    """A line about a token store, which is printed at every start."""
    left_out = "".join(f", {count:,} {what}" for what, count in store.counts.items())
    size = store.statistics.get("text_bytes", 0)
    rate = f" ({size / 1e6:,.1f} MB, {store.tokens / size:.3f} tokens a byte)" if size else ""
    places = {part.elsewhere.path for part in store.parts if part.elsewhere}
    count = f"{store.documents:,} documents, " if store.statistics.get("lengths") or not places else ""
    where = f"; {len(places):,} {'file' if len(places) == 1 else 'files'} of ids read in place" if places else ""
    return f"{key}: {count}{store.tokens:,} tokens{rate}{left_out}{where}; in {store.folder}"


def table_of(store: TokenStore) -> list[list[str]]:
    """The statistics of a token store as rows of name and value, or an empty list if the store has no statistics."""
    if not (known := store.statistics):
        return []
    lengths = ", ".join(f"{name} {value:,.0f}" for name, value in known["lengths"].items())
    shown = [repr(text if len(text) < 80 else f"{text[:80]}…") for text in known.get("examples", [])]
    return [
        *([["tokens of a document", lengths]] if lengths else []),
        ["unigram entropy", f"{known['unigram_entropy']:.3f} nats"],
        *(["begins" if number == 0 else "", text] for number, text in enumerate(shown)),
        *(["left out" if number == 0 else "", line] for number, line in enumerate(known.get("bad_records", []))),
    ]
