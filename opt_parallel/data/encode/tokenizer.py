"""Tokenizers trained from the data, checked against a network, and put to use.

Documents are encoded without special tokens and end in the model's end-of-text token. A prompt, which other tools
encode with the tokenizer's own template, starts with that same token, as OPT's do. What a text spells of a special
token is text, or with `data.special_tokens=tokens` that token: in documents and prompts alike.
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
    Brought,
    byte_level,
    check_size,
    read_tokenizer,
    write_tokenizer,
)
from opt_parallel.runtime.errors import UserError, one_line

SPECIALS = [START, PAD, END, UNKNOWN]  # OPT's order, so that their ids are OPT's


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file, a folder or a hub id, see `hf_tokenizer.read_tokenizer`. Raises: `UserError`."""
    return read_tokenizer(name).tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, key: str = "model.vocab_size=") -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens (fewer if the text is short), `SPECIALS` first. `key`: what the
    user set the size by.

    Raises: `UserError` if `vocab_size` has no room for the bytes and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIALS) + len(alphabet)
    require(
        vocab_size >= smallest,
        f"{key}{vocab_size} is too small for a byte-level tokenizer: choose {smallest} or more, "
        "or bring a tokenizer with data.tokenizer=…",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return byte_level(tokenizer.model, SPECIALS)


def of_opt(tokenizer: Tokenizer) -> Brought:
    """A tokenizer whose special tokens are OPT's, as far as it has them."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    roles = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN if UNKNOWN in special else END, "pad_token": PAD}
    return Brought(tokenizer, {role: token for role, token in roles.items() if token in special})


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> None:
    """Write a tokenizer with OPT's special tokens into `folder`. Raises: OSError."""
    write_tokenizer(replace(of_opt(tokenizer), chat_template=chat_template), folder)


def check_tokenizer(tokenizer: Tokenizer, name: str, model: ModelConfig, end: int | None = None) -> None:
    """Raise `UserError` unless every token has a row in the embedding and both mean the same end of text.

    `end`: the token that the tokenizer's files say ends a text; None: `</s>`, where it has one."""
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
        f"model.eos_token_id={model.eos_token_id} is no special token of data.tokenizer={name}: "
        f"choose among {specials or 'none; bring another tokenizer'}",
    )


def check_padding(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise `UserError` if a text can hold the token that stands for padding: its end would not be found, and its
    embedding would not be trained."""
    pad, added = model.pad_token_id, tokenizer.get_added_tokens_decoder()
    word = tokenizer.id_to_token(pad)
    require(
        word is None or (pad in added and added[pad].special),
        f"model.pad_token_id={pad} is the word {word!r} of the tokenizer, not a special token: set model.pad_token_id "
        "to one that no text holds",
    )


def encode_documents(
    tokenizer: Tokenizer, documents: list[str], spelled: SpecialTokens = SpecialTokens.text
) -> list[list[int]]:
    """The token ids of each document, nothing added. `spelled`: what a special token is that a text spells."""
    with _spelled(tokenizer, spelled):
        encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, model: ModelConfig, spelled: SpecialTokens = SpecialTokens.text
) -> list[int]:
    """The token ids of a prompt: as OPT's, it starts with the end-of-text token.

    Raises: UserError for bytes of a command line, or escapes of a JSON text, that are no characters."""
    require(prompt.encode(errors="ignore").decode() == prompt, f"the prompt {prompt!r} is no text: write it in UTF-8")
    ids = [model.eos_token_id, *encode_documents(tokenizer, [prompt], spelled)[0]]
    require(
        max(ids) < model.vocab_size,
        f"the prompt {prompt!r} has the token {max(ids)} ({tokenizer.id_to_token(max(ids))!r}), of which the network, "
        f"of {model.vocab_size} words, knows nothing: bring the tokenizer that it was trained with",
    )
    return ids


@contextmanager
def _spelled(tokenizer: Tokenizer, spelled: SpecialTokens) -> Iterator[None]:
    """Encode as `spelled` says. Raises: UserError for what fails in the library, as a regular expression that gives a
    text up: it is no Exception there."""
    tokenizer.encode_special_tokens = spelled is SpecialTokens.text
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"data.tokenizer fails at the text ({one_line(error):.300}): bring another") from error
    finally:
        tokenizer.encode_special_tokens = False


def decode_continuation(tokenizer: Tokenizer, ids: list[int], prompt: int) -> str:
    """The text of `ids` after the first `prompt` of them. Decoded from the start: some tokenizers drop the space that
    a text begins with."""
    return tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:prompt]))
