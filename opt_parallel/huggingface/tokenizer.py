"""Reads Hugging Face's tokenizer files in the same way as `AutoTokenizer` of transformers, without transformers.

The tokenizer is read from tokenizer.json, or from vocab.json and merges.txt. Further tokens are read from
tokenizer_config.json, special_tokens_map.json and added_tokens.json. These three files also have settings, such as the
bos, eos and pad token, the maximum length of a text, and a chat template. `AutoTokenizer` reads the same tokenizer from
the files that this module writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub  # its functions are named at their use, because the first name imports for half a second
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from opt_parallel.config.model import ModelConfig, require
from opt_parallel.config.paths import reach
from opt_parallel.huggingface.hub import HUB_ID
from opt_parallel.huggingface.tokenizer_trial import require_bounded
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import content_of, file_in, parse_json, read_json, read_limited

KEY = "data.tokenizer="  # the start of messages about a tokenizer
START, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
OF_GPT2 = "<|endoftext|>"
TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, VOCABULARY, MERGES, SETTINGS, SPECIALS, ADDED, CHAT_TEMPLATE)

OF_MODELS = ("bos_token", "eos_token", "pad_token")  # the configuration of a network has the ids of these tokens
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")  # the names of the key in transformers 4 and 5
LIKE_GPT2 = {None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Settings that are not copied, because tokenizer.json has them, or because they name files and code of other programs.
NOT_KEPT = {
    "added_tokens_decoder", "add_bos_token", "add_eos_token", "auto_map", "backend", "chat_template", "is_local",
    "local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_class", "tokenizer_file", *EXTRA,
}  # fmt: skip


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and the settings in its files.

    The `settings` have the keys of tokenizer_config.json, and each token is given by its text. `extra` are the special
    tokens without a role such as padding."""

    tokenizer: Tokenizer
    settings: dict[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    chat_template: str | None = None

    @property
    def ids(self) -> dict[str, int]:
        """The values of `bos_token_id`, `eos_token_id` and `pad_token_id`, if the tokenizer's files name the tokens."""
        found = {role: self.tokenizer.token_to_id(self.settings.get(role) or "") for role in OF_MODELS}
        return {f"{role}_id": number for role, number in found.items() if number is not None}

    def of_model(self, model: ModelConfig) -> LoadedTokenizer:
        """The tokenizer with the same bos, eos and pad tokens as the network `model`."""
        added = self.tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        return replace(self, settings=self.settings | roles_of(model, special))

    def identity(self) -> list[Any]:
        """A description of the tokenizer that is equal if the content of its files is equal."""
        return [self.tokenizer.to_str(), self.settings, list(self.extra), self.chat_template]


def roles_of(model: ModelConfig, special: dict[int, str]) -> dict[str, str]:
    """The texts of those of `model`'s bos, eos and pad tokens that are among the `special` tokens (by id)."""
    ids = {role: getattr(model, f"{role}_id") for role in OF_MODELS}
    return {role: special[number] for role, number in ids.items() if number in special}


def other_ids(model: ModelConfig) -> list[list[int]]:
    """The ids of `model`'s bos, eos and pad tokens, or an empty list if they are the same as in OPT.

    The list is part of a cache key."""
    ids, usual = ([getattr(of, f"{role}_id") for role in OF_MODELS] for of in (model, ModelConfig))
    return [] if ids == usual else [ids]


def find_tokenizer(name: str, key: str = KEY) -> Path:
    """The file or folder `name`, or the folder with a download of the hub id `name`. `key` is the key that set `name`,
    for messages. Raises: UserError."""
    if path := reach(key, name):
        return path
    way_out = f"name a folder with tokenizer.json{_or_train(key)}"
    require(HUB_ID.fullmatch(name) is not None, f"{key}{name} does not exist: {way_out}")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        raise UserError(
            f"{key}{name} is not a local folder and could not be downloaded from the hub ({one_line(error)}): {way_out}"
        ) from error


def _or_train(where: str) -> str:
    return ", or set data.tokenizer=null to train a tokenizer on data.train" if where.startswith(KEY) else ""


def read_tokenizer(name: str, key: str = KEY) -> LoadedTokenizer:
    """The tokenizer in the file tokenizer.json, the folder or the hub id `name`. `key` is the key that set `name`, for
    messages. Raises: UserError."""
    path, where = find_tokenizer(name, key), f"{key}{name}"
    try:
        return LoadedTokenizer(_from_json(path, where)) if path.is_file() else _from_folder(path, where)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library `tokenizers` is a BaseException, not an Exception
        raise UserError(f"{where} cannot be read ({one_line(error):.500}): use a complete copy") from error


def write_tokenizer(loaded: LoadedTokenizer, folder: Path) -> None:
    """Write a tokenizer into `folder`, in files that `AutoTokenizer` of transformers can read. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files_of(loaded).items():
        (folder / name).write_bytes(content)


def _files_of(loaded: LoadedTokenizer) -> dict[str, bytes]:
    roles = {role: text for role in ROLES if (text := loaded.settings.get(role)) is not None}
    extra = {EXTRA[0]: list(loaded.extra)} if loaded.extra else {}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {TOKENIZER: loaded.tokenizer.to_str(pretty=True).encode()}
    for name, content in ((SETTINGS, plain | loaded.settings | extra), (SPECIALS, roles | extra)):
        files[name] = (json.dumps(content, indent=2) + "\n").encode()
    if loaded.chat_template is not None:
        files[CHAT_TEMPLATE] = loaded.chat_template.encode()
    return files


def files_for(folder: Path, model: ModelConfig) -> dict[str, bytes]:
    """The contents of the tokenizer files for an export of `model`, by file name. Raises: UserError.

    The files in `folder` are used if they name the same bos, eos and pad tokens as `model`. If the tokens differ, new
    files are written with the tokens of `model`."""
    found = {name: content_of(folder, name) for name in FILES}
    files = {name: content for name, content in found.items() if content is not None}
    try:
        wanted = roles_of(model, special_tokens_in(files))
        if wanted.items() <= _named_in(files).items():
            return files
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({one_line(error):.300}): use a complete copy"
        ) from error
    return _files_of(read_tokenizer(str(folder)).of_model(model))


def special_tokens_in(files: dict[str, bytes]) -> dict[int, str]:
    """The special tokens in a tokenizer's files, by id. From vocab.json, only tokens with a role are read.

    Raises: ValueError, TypeError, KeyError or AttributeError if the files are damaged."""
    if TOKENIZER in files:
        added = parse_json(files[TOKENIZER]).get("added_tokens", [])
        return {token["id"]: token["content"] for token in added if token["special"]}
    vocabulary = parse_json(files.get(VOCABULARY, b"{}"))
    return {vocabulary[text]: text for text in _named_in(files).values() if text in vocabulary}


def _named_in(files: dict[str, bytes]) -> dict[str, str]:
    settings, specials = (parse_json(files.get(name, b"{}")) for name in (SETTINGS, SPECIALS))
    return {role: _text(value) for role, value in (settings | specials).items() if role in OF_MODELS and value}


def count_tokens(tokenizer: Tokenizer) -> int:
    """The number of rows that an embedding needs for the tokens, which is the largest token id plus 1."""
    return max(tokenizer.get_vocab().values()) + 1


def check_size(tokenizer: Tokenizer, name: str, rows: int) -> None:
    """Raise `UserError` if an embedding of `rows` rows is too small for the tokens."""
    tokens = count_tokens(tokenizer)
    require(
        tokens <= rows,
        f"data.tokenizer={name} has {tokens} tokens, but the embedding has only model.vocab_size={rows} rows: set "
        f"model.vocab_size to {tokens} or more, or use a smaller tokenizer",
    )


def _from_folder(folder: Path, where: str) -> LoadedTokenizer:
    settings, decoder, added = _settings(folder)
    path = file_in(folder, TOKENIZER)
    tokenizer = _from_vocabulary(folder, where, settings) if path is None else _from_json(path, where)
    tokenizer.add_tokens([token for _, token in sorted(decoder.items())])  # sets the flags of tokens that exist
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    others = [*(token for _, token in sorted(added.items())), *_special_tokens(settings)]
    tokenizer.add_tokens([token for token in others if token.content not in present])
    for number, token in (decoder | added).items():
        found = tokenizer.token_to_id(token.content)
        require(
            found == number,
            f"{where}: its files give the token {token.content!r:.80} the id {number}, but by the order "
            f"of the tokens its id is {found}: use a complete copy",
        )
    if not any(settings.get(role) for role in ROLES) and OF_GPT2 in present:
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), OF_GPT2)  # the defaults of GPT2Tokenizer
    template, own = content_of(folder, CHAT_TEMPLATE), settings.get("chat_template")
    own = own if isinstance(own, str) else None
    roles = {role: _text(settings[role]) for role in ROLES if settings.get(role)}
    kept = {key: value for key, value in settings.items() if key not in NOT_KEPT} | roles
    extra = tuple(dict.fromkeys(_text(value) for value in _extra(settings)))
    return LoadedTokenizer(tokenizer, kept, extra, own if template is None else template.decode())


def _settings(folder: Path) -> tuple[dict[str, Any], dict[int, AddedToken], dict[int, AddedToken]]:
    """The settings in the tokenizer's files, and two dicts of the tokens that the files add, by id.

    The flags of the tokens in the first dict override those in tokenizer.json. The tokens in the second dict are used
    only if tokenizer.json does not have them."""
    settings = _json_in(folder, SETTINGS)
    if "added_tokens_decoder" in settings:
        return settings, {int(number): _token(value) for number, value in settings["added_tokens_decoder"].items()}, {}
    settings |= _json_in(folder, SPECIALS)
    special = {token.content for token in _special_tokens(settings)}
    added = {
        int(number): AddedToken(text, normalized=text not in special, special=text in special)
        for text, number in _json_in(folder, ADDED).items()
    }
    return settings, {}, added


def _json_in(folder: Path, name: str) -> dict[str, Any]:
    path = file_in(folder, name)
    content = {} if path is None else read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    return content


def _special_tokens(settings: dict[str, Any]) -> list[AddedToken]:
    """The tokens that have a role in the settings, such as padding, or that the settings name as special tokens."""
    others = [key for key in settings if key.endswith("_token") and key not in ROLES]
    values = [settings.get(role) for role in (*ROLES, *others)] + _extra(settings)
    return [_token(value, special=True) for value in values if value and isinstance(value, (str, dict))]


def _extra(settings: dict[str, Any]) -> list[Any]:
    found: Any = next((settings[key] for key in EXTRA if settings.get(key)), [])
    return list(found.values()) if isinstance(found, dict) else list(found)


def _text(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)


def _token(value: Any, special: bool | None = None) -> AddedToken:
    """A token, which the files give as a text, or as an object with a text and flags."""
    flags = {name: value[name] for name in FLAGS if name in value} if isinstance(value, dict) else {}
    return AddedToken(_text(value), **(flags if special is None else {**flags, "special": special}))


def _from_json(path: Path, where: str) -> Tokenizer:
    text = read_limited(path).decode()
    require_bounded(text, where)
    tokenizer = Tokenizer.from_str(text)
    require(tokenizer.get_vocab_size() > 0, f"{where} has no tokens: use another tokenizer")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_vocabulary(folder: Path, where: str, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of OPT or GPT-2 from vocab.json and merges.txt, with the special tokens that the settings name."""
    vocabulary, merges = file_in(folder, VOCABULARY), file_in(folder, MERGES)
    if vocabulary is None or merges is None:
        raise UserError(
            f"{where} contains neither {TOKENIZER} nor {VOCABULARY} with {MERGES}: name a folder with these files"
            f"{_or_train(where)}"
        )
    require(
        settings.get("tokenizer_class") in LIKE_GPT2,
        f"{where} is a {settings.get('tokenizer_class')!r:.80}, but {VOCABULARY} alone is read as a "
        f"GPT-2 tokenizer: add the file {TOKENIZER}, which transformers can save",
    )
    read_limited(vocabulary), read_limited(merges)  # raises an error if one of the files is too large
    model = models.BPE.from_file(str(vocabulary), str(merges))
    named = [_text(settings[role]) for role in ROLES if settings.get(role)]
    if not named:
        named = [OF_GPT2] if model.token_to_id(OF_GPT2) is not None else [PAD, END]
        if missing := [text for text in named if model.token_to_id(text) is None]:
            raise UserError(
                f"{where}: {VOCABULARY} has no token {missing[0]}, so it is not OPT's, and no file names "
                f"the special tokens: add the file {SETTINGS} or {TOKENIZER}"
            )
        settings |= dict.fromkeys(("bos_token", "eos_token"), named[-1])
    if file_in(folder, SETTINGS) is None:
        settings["add_bos_token"] = _text(settings.get("bos_token")) == END  # prompts of OPT start with this token
    ends = [settings.get(f"{role}_token") if settings.get(f"add_{role}_token") else None for role in ("bos", "eos")]
    begin, end = (None if value is None else _text(value) for value in ends)
    specials = [text for text in dict.fromkeys(named) if model.token_to_id(text) is not None]
    return byte_level(model, specials, begin, end, bool(settings.get("add_prefix_space")))


def byte_level(
    model: models.Model, specials: list[str], begin: str | None = END, end: str | None = None, prefix: bool = False
) -> Tokenizer:
    """A byte-level tokenizer as in GPT-2, with the vocabulary of `model`. Special tokens are not split.

    If `encode` is called with `add_special_tokens`, it adds the tokens `begin` and `end`. With `prefix`, a space is
    added before each text."""
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    around = [token for token in (begin, end) if token is not None]
    if around:
        before, after = f"{begin} " if begin else "", f" {end}" if end else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}",
            pair=f"{before}$A{after} {before}$B{after}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)],
        )
    return tokenizer
