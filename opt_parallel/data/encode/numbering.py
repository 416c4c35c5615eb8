"""Translates token ids from one tokenizer's numbering to another's, where both tokenizers have the same tokens.

GPT-2's tokenizer and OPT's split every text into the same strings, and number them differently. A table maps each id of
one numbering to that of the other. It exists only if both tokenizers are byte-pair encodings with the same merges in
the same order, and treat text in the same way before the merges. Special tokens are matched by their roles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opt_parallel.config.model import require
from opt_parallel.data.encode.tokenizer import encode_documents
from opt_parallel.huggingface.tokenizer import END, OF_GPT2, LoadedTokenizer, count_tokens
from opt_parallel.runtime.errors import UserError

SETTINGS = ("byte_fallback", "continuing_subword_prefix", "dropout", "end_of_word_suffix", "ignore_merges")
ROLES = ("eos_token", "bos_token", "unk_token", "pad_token")  # in the order in which roles of one token are looked up
WAY_OUT = "write the corpus with data.tokenizer, or train with the tokenizer of these ids"


@dataclass(frozen=True)
class Numbering:
    """The numbering of the tokenizer `name`. `table` (its ids,) int32 has the ids of the run's tokenizer, and −1 for
    tokens without a partner. `end` is the id that ends a document in this numbering."""

    name: str
    tokenizer: Tokenizer
    table: np.ndarray
    end: int


def numbering_of(name: str, theirs: LoadedTokenizer, ours: LoadedTokenizer, end: int) -> Numbering:
    """The numbering of `data.ids_of=name`, where `end` is the id that ends a document in the run's tokenizer `ours`.

    Raises: UserError if the tokenizers differ in more than their numbering."""
    key = f"data.ids_of={name}"
    model, other = (json.loads(each.tokenizer.to_str()) for each in (theirs, ours))
    require(
        model["model"]["type"] == other["model"]["type"] == "BPE",
        f"{key} is a {model['model']['type']} and data.tokenizer a {other['model']['type']}, but only the ids of "
        f"byte-pair encodings (BPE) can be translated: {WAY_OUT}",
    )
    _check_merges(key, model["model"], other["model"])
    for part in ("normalizer", "pre_tokenizer"):
        require(
            model[part] == other[part],
            f"{key} splits text otherwise than data.tokenizer ({part}: {json.dumps(model[part])[:200]} and "
            f"{json.dumps(other[part])[:200]}), so its ids mean other texts: {WAY_OUT}",
        )
    table = np.full(count_tokens(theirs.tokenizer), -1, np.int32)
    special = {token.content for token in theirs.tokenizer.get_added_tokens_decoder().values() if token.special}
    vocabulary = ours.tokenizer.get_vocab()
    for text, number in theirs.tokenizer.get_vocab().items():
        if text not in special:
            require(
                text in vocabulary,
                f"{key} has the token {text!r:.80} = {number}, which data.tokenizer lacks: {WAY_OUT}",
            )
            table[number] = vocabulary[text]
    roles = _roles(theirs)
    for role, text in reversed(list(roles.items())):
        partner = end if role == "eos_token" else _roles(ours).get(role)
        partner = ours.tokenizer.token_to_id(partner) if isinstance(partner, str) else partner
        if partner is not None:
            table[theirs.tokenizer.token_to_id(text)] = partner
    ends = theirs.tokenizer.token_to_id(roles.get("eos_token", ""))
    if ends is None:
        raise UserError(
            f"{key} names no end-of-text token: name its folder with tokenizer_config.json, which has eos_token"
        )
    return Numbering(name, theirs.tokenizer, table, ends)


def mapped(
    ids: np.ndarray, where: str, below: int, table: np.ndarray | None, error: type[UserError] = UserError
) -> np.ndarray:
    """The run's ids for the ids of a corpus, which `where` names. They are equal without a `table`.

    Raises: `error` for an id that is not `below` this number, or not in the table."""
    limit = below if table is None else len(table)
    if len(ids) and not (ids.min() >= 0 and ids.max() < limit):
        wrong = int(ids.max() if ids.min() >= 0 else ids.min())
        raise error(
            f"{where} has the id {wrong}, outside the {limit:,} ids of its tokenizer: name the tokenizer of these ids "
            "by data.tokenizer or data.ids_of, or the type of a file without header by data.dtype"
        )
    if table is None:
        return ids
    found = table[ids].astype(np.int64)
    if len(found) and found.min() < 0:
        raise error(
            f"{where} has the id {int(ids[found.argmin()])}, a token of data.ids_of without a partner in "
            "data.tokenizer: train with the tokenizer of these ids, or write the corpus without this token"
        )
    return found


def prove(numbering: Numbering, ours: Tokenizer, documents: Iterable[np.ndarray], key: str) -> int:
    """Decode and encode documents of a corpus with both tokenizers, and return the number of compared documents.

    Special tokens are left out, because their texts differ. Raises: UserError unless both tokenizers decode a document
    to the same text, and encode this text to the same tokens."""
    compared = 0
    added = numbering.tokenizer.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special]
    for document in documents:
        mapped(document, key, 0, numbering.table)  # raises an error for a token without a partner
        ids = document[~np.isin(document, special)]
        translated = mapped(ids, key, 0, numbering.table)
        text = numbering.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        own = ours.decode(translated.tolist(), skip_special_tokens=False)
        again, encoded = (encode_documents(each, [text])[0] for each in (numbering.tokenizer, ours))
        require(
            text == own and mapped(np.array(again, np.int64), key, 0, numbering.table).tolist() == encoded,
            f"{key}: data.ids_of={numbering.name} and data.tokenizer read the tokens of {text!r:.80} differently: "
            f"{WAY_OUT}",
        )
        compared += 1
    return compared


def _roles(loaded: LoadedTokenizer) -> dict[str, str]:
    """The text of the tokens with a role. A tokenizer.json alone names no roles, so its end is found by its text."""
    roles = {role: loaded.settings[role] for role in ROLES if loaded.settings.get(role)}
    known = next((text for text in (END, OF_GPT2) if loaded.tokenizer.token_to_id(text) is not None), None)
    return roles if roles or known is None else {"eos_token": known}


def _check_merges(key: str, model: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise UserError unless two byte-pair encodings have the same merges in the same order."""
    merges, others = ([_pair(merge) for merge in each["merges"]] for each in (model, other))
    place = next((place for place, (one, two) in enumerate(zip(merges, others, strict=False)) if one != two), None)
    if place is not None:
        raise UserError(
            f"{key} has other merges than data.tokenizer: merge {place + 1} is {' '.join(merges[place])!r} and "
            f"{' '.join(others[place])!r}, so its ids mean other texts: {WAY_OUT}"
        )
    require(
        len(merges) == len(others),
        f"{key} has {len(merges):,} merges and data.tokenizer {len(others):,}, so its ids mean other texts: {WAY_OUT}",
    )
    for name in SETTINGS:
        require(
            (model.get(name) or None) == (other.get(name) or None),
            f"{key} has {name}={model.get(name)} and data.tokenizer {name}={other.get(name)}: {WAY_OUT}",
        )


def _pair(merge: Any) -> tuple[str, ...]:
    """A merge, which older files of the library have as one text."""
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
