"""Trains tokenizers, checks them against a network, and encodes documents and prompts.

Documents are encoded without special tokens; the encoder appends the model's end-of-text token. A prompt starts with
the same token, as in OPT. If a text contains the spelling of a special token, it is encoded as text, or with
`data.special_tokens=tokens` as that token. This holds for documents and prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from opt_parallel.config.data import SpecialTokens
from opt_parallel.config.model import ModelConfig, require
from opt_parallel.huggingface.tokenizer import (
    END,
    PAD,
    START,
    UNKNOWN,
    LoadedTokenizer,
    byte_level,
    check_size,
    read_tokenizer,
    write_tokenizer,
)
from opt_parallel.runtime.errors import UserError, one_line

SPECIALS = [START, PAD, END, UNKNOWN]  # OPT's order, so that their ids are OPT's


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file, a folder or a hub id, see `huggingface.tokenizer.read_tokenizer`. Raises: UserError."""
    return read_tokenizer(name).tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, key: str = "model.vocab_size=") -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens (fewer if the text is short), `SPECIALS` first. `key`: the
    setting of the size, for messages.

    Raises: `UserError` if `vocab_size` is smaller than the number of bytes and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIALS) + len(alphabet)
    require(
        vocab_size >= smallest,
        f"{key}{vocab_size} is too small for a byte-level tokenizer: choose {smallest} or more, "
        "or name a tokenizer with data.tokenizer=…",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return byte_level(tokenizer.model, SPECIALS)


def of_opt(tokenizer: Tokenizer) -> LoadedTokenizer:
    """The tokenizer with OPT's special tokens in their roles, as far as it has them."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    roles = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN if UNKNOWN in special else END, "pad_token": PAD}
    return LoadedTokenizer(tokenizer, {role: token for role, token in roles.items() if token in special})


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> None:
    """Write a tokenizer with OPT's special tokens into `folder`. Raises: OSError."""
    write_tokenizer(replace(of_opt(tokenizer), chat_template=chat_template), folder)


def check_tokenizer(tokenizer: Tokenizer, name: str, model: ModelConfig, end: int | None = None) -> None:
    """Raise `UserError` if a token has no row in the embedding, or if tokenizer and model have different end-of-text
    tokens.

    `end`: the id of the end-of-text token by the tokenizer's files; None: that of `</s>`, if there is one."""
    check_size(tokenizer, name, model.vocab_size)
    end = tokenizer.token_to_id(END) if end is None else end
    require(
        end is None or end == model.eos_token_id,
        f"data.tokenizer={name} ends a document with {tokenizer.id_to_token(end or 0)} = {end}, the model with "
        f"model.eos_token_id={model.eos_token_id}: set model.eos_token_id={end}",
    )
    added = tokenizer.get_added_tokens_decoder()
    specials = ", ".join(f"{number} ({token.content})" for number, token in sorted(added.items()) if token.special)
    require(
        model.eos_token_id in added and added[model.eos_token_id].special,
        f"model.eos_token_id={model.eos_token_id} is not a special token of data.tokenizer={name}: "
        f"choose among {specials or 'none; name another tokenizer'}",
    )


def check_padding(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise `UserError` if the padding token can occur in a text. The end of the text would not be found, and the
    token's embedding would not be trained."""
    pad, added = model.pad_token_id, tokenizer.get_added_tokens_decoder()
    word = tokenizer.id_to_token(pad)
    require(
        word is None or (pad in added and added[pad].special),
        f"model.pad_token_id={pad} is the word {word!r} of the tokenizer, not a special token: set model.pad_token_id "
        "to a token that no text contains",
    )


def encode_documents(
    tokenizer: Tokenizer, documents: list[str], spelled: SpecialTokens = SpecialTokens.text
) -> list[list[int]]:
    """The token ids of each document; none are added. `spelled`: how to encode the spelling of a special token."""
    with _spelled(tokenizer, spelled):
        encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, model: ModelConfig, spelled: SpecialTokens = SpecialTokens.text
) -> list[int]:
    """The token ids of a prompt, which start with the end-of-text token, as in OPT.

    Raises: UserError for invalid Unicode from a command line or a JSON text; for an id outside the vocabulary."""
    require(
        prompt.encode(errors="ignore").decode() == prompt, f"the prompt {prompt!r} is not valid text: write it in UTF-8"
    )
    ids = [model.eos_token_id, *encode_documents(tokenizer, [prompt], spelled)[0]]
    require(
        max(ids) < model.vocab_size,
        f"the prompt {prompt!r} has the token {max(ids)} ({tokenizer.id_to_token(max(ids))!r}), outside the network's "
        f"vocabulary of {model.vocab_size}: use the tokenizer that it was trained with",
    )
    return ids


@contextmanager
def _spelled(tokenizer: Tokenizer, spelled: SpecialTokens) -> Iterator[None]:
    """Set the tokenizer's handling of special tokens to `spelled`. Raises: UserError for a failure in the library, such
    as a regular expression that fails on a text; the library raises a BaseException there."""
    tokenizer.encode_special_tokens = spelled is SpecialTokens.text
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"data.tokenizer fails at the text ({one_line(error):.300}): use another tokenizer") from error
    finally:
        tokenizer.encode_special_tokens = False


def decode_continuation(tokenizer: Tokenizer, ids: list[int], prompt: int) -> str:
    """The text of `ids` after the first `prompt` ids. Decodes from the start, because some tokenizers drop a leading
    space."""
    return tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:prompt]))
