"""Tokenizers: brought as a folder or a hub id, or trained from the data; always saved so that others load them.

Documents are encoded without special tokens and end in the model's end-of-text token. A prompt, which other tools
encode with the tokenizer's own template, starts with that same token, as OPT's do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from opt_parallel.errors import UserError, one_line
from opt_parallel.hub import HUB_ID
from opt_parallel.paths import reach
from opt_parallel.shapes import ModelConfig, require

START, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
SPECIALS = [START, PAD, END, UNKNOWN]  # OPT's order, so that their ids are OPT's
FILES = ["tokenizer.json", "vocab.json", "merges.txt"]
CHAT_TEMPLATE = "chat_template.jinja"


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file of the tokenizers library, of a folder (tokenizer.json, or OPT's vocab.json and
    merges.txt) or of a hub id.

    Raises: `UserError`."""
    folder = reach("data.tokenizer=", name) or _download(name)
    try:
        file = folder if folder.is_file() else folder / "tokenizer.json"
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            tokenizer = _byte_level(bpe, [PAD, END])
        else:
            raise UserError(
                f"data.tokenizer={name} holds neither tokenizer.json nor vocab.json with merges.txt: "
                "name the folder that does, or set data.tokenizer=null to train one on data.train"
            )
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"data.tokenizer={name} cannot be read ({one_line(error)}): bring a whole copy") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
    return _byte_level(tokenizer.model, SPECIALS)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> None:
    """Write `tokenizer` into `folder` for `load_tokenizer` and for transformers' `AutoTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    roles = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN if UNKNOWN in special else END, "pad_token": PAD}
    known = {role: token for role, token in roles.items() if token in special}
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **known}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", known)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


def check_tokenizer(tokenizer: Tokenizer, name: str, model: ModelConfig) -> None:
    """Raise `UserError` unless every token has a row in the embedding and both mean the same end of text."""
    tokens = count_tokens(tokenizer)
    require(
        tokens <= model.vocab_size,
        f"data.tokenizer={name} has {tokens} tokens, model.vocab_size={model.vocab_size} rows: "
        f"set model.vocab_size to {tokens} or more, or bring a smaller tokenizer",
    )
    end = tokenizer.token_to_id(END)
    require(
        end is None or end == model.eos_token_id,
        f"data.tokenizer={name} ends a document with {END} = {end}, the model with model.eos_token_id="
        f"{model.eos_token_id}: set model.eos_token_id={end}",
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


def count_tokens(tokenizer: Tokenizer) -> int:
    """Rows that the tokens need in an embedding: the largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    """The token ids of each document, nothing added: text that spells a special token stays text.

    Raises: UserError if the tokenizer fails at them."""
    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises nothing narrower, and a panic of Rust is no Exception
        raise UserError(f"data.tokenizer fails at the text ({one_line(error)}): bring another") from error
    finally:
        tokenizer.encode_special_tokens = False
    return [encoding.ids for encoding in encodings]


def encode_prompt(tokenizer: Tokenizer, prompt: str, model: ModelConfig) -> list[int]:
    """The token ids of a prompt: as OPT's, it starts with the end-of-text token.

    Raises: UserError for bytes of a command line, or escapes of a JSON text, that are no characters."""
    require(prompt.encode(errors="ignore").decode() == prompt, f"the prompt {prompt!r} is no text: write it in UTF-8")
    ids = [model.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    require(
        max(ids) < model.vocab_size,
        f"the prompt {prompt!r} has the token {max(ids)} ({tokenizer.id_to_token(max(ids))!r}), of which the network, "
        f"of {model.vocab_size} words, knows nothing: bring the tokenizer that it was trained with",
    )
    return ids


def decode_continuation(tokenizer: Tokenizer, ids: list[int], prompt: int) -> str:
    """The text of `ids` after the first `prompt` of them. Decoded from the start: some tokenizers drop the space that
    a text begins with."""
    return tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:prompt]))


def _byte_level(model: models.Model, specials: list[str]) -> Tokenizer:
    """OPT's tokenizer around `model`: GPT-2's split into bytes, and prompts that start with `</s>`."""
    missing = [token for token in specials if model.token_to_id(token) is None]
    if missing:
        raise UserError(
            f"data.tokenizer: vocab.json has no {missing[0]}, so it is not OPT's: bring the tokenizer.json beside it"
        )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def _download(name: str) -> Path:
    way_out = "name a folder with tokenizer.json, or set data.tokenizer=null to train one on data.train"
    require(HUB_ID.fullmatch(name) is not None, f"data.tokenizer={name} does not exist: {way_out}")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:
        raise UserError(
            f"data.tokenizer={name} is no folder here, and the hub did not give it ({one_line(error)}): {way_out}"
        ) from error
