"""Trains tokenizers, checks them against a network, and encodes documents and prompts.

Documents are encoded without special tokens, and the encoder appends the model's end-of-text token. A prompt starts
with the end-of-text token, as in OPT. If a document or prompt contains the spelling of a special token, such as `</s>`,
this spelling is encoded as text. With `data.special_tokens=tokens`, the spelling is encoded as the special token.
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

SPECIALS = [START, PAD, END, UNKNOWN]  # in OPT's order, so that these tokens have the same ids as in OPT


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a file, in a folder or on the Hugging Face hub. Raises: UserError."""
    return read_tokenizer(name).tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, key: str = "model.vocab_size=") -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens. The first tokens are `SPECIALS`.

    A short text yields fewer tokens. Messages name the setting of the vocabulary's size by `key`.

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
    """The tokenizer with the roles (such as padding) of those special tokens of OPT that its vocabulary contains."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    roles = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN if UNKNOWN in special else END, "pad_token": PAD}
    return LoadedTokenizer(tokenizer, {role: token for role, token in roles.items() if token in special})


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> None:
    """Write a tokenizer with OPT's special tokens into `folder`. Raises: OSError."""
    write_tokenizer(replace(of_opt(tokenizer), chat_template=chat_template), folder)


def check_tokenizer(tokenizer: Tokenizer, name: str, model: ModelConfig, end: int | None = None) -> None:
    """Raise `UserError` if the tokenizer does not fit the model.

    Each token must have a row in the embedding, and tokenizer and model must have the same end-of-text token. `end` is
    the id of the end-of-text token in the tokenizer's files, by default that of `</s>` if the vocabulary has `</s>`."""
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
    """Raise `UserError` if the padding token can occur in a text.

    The end of a text with the padding token would not be found, and the token's embedding would not be trained."""
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
    """The token ids of each document, without added tokens.

    `spelled` decides whether the spelling of a special token is encoded as text or as the token."""
    with _spelled(tokenizer, spelled):
        encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, model: ModelConfig, spelled: SpecialTokens = SpecialTokens.text
) -> list[int]:
    """The token ids of a prompt, which start with the end-of-text token, as in OPT.

    Raises: UserError if the prompt contains invalid Unicode, or if a token id is outside the vocabulary."""
    require(
        prompt.encode(errors="ignore").decode() == prompt, f"the prompt {prompt!r} is not valid text: write it in UTF-8"
    )
    ids = [model.eos_token_id, *encode_documents(tokenizer, [prompt], spelled)[0]]
    require(
        max(ids) < model.vocab_size,
        f"the prompt {prompt!r} has the token {max(ids)} ({tokenizer.id_to_token(max(ids))!r}), outside the network's "
        f"vocabulary of {model.vocab_size}: use the tokenizer that the network was trained with",
    )
    return ids


@contextmanager
def _spelled(tokenizer: Tokenizer, spelled: SpecialTokens) -> Iterator[None]:
    """A context that sets the tokenizer's handling of special tokens, and turns an error of the library into UserError.

    For example, the library raises a BaseException if its regular expression fails on a text."""
    tokenizer.encode_special_tokens = spelled is SpecialTokens.text
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(
            f"data.tokenizer cannot encode the text ({one_line(error):.300}): use another tokenizer"
        ) from error
    finally:
        tokenizer.encode_special_tokens = False


def decode_continuation(tokenizer: Tokenizer, ids: list[int], prompt: int) -> str:
    """The text of `ids` after the first `prompt` ids.

    The function decodes all ids and then removes the text of the prompt. Some tokenizers drop a space at the start of
    a decoded text, so without the prompt the space between prompt and continuation would be lost."""
    return tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:prompt]))
