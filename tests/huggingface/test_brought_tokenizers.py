"""Tokenizers that users bring: read as transformers reads them, whatever files they come in, kept as they are through a
run, and refused in a line where they would take for ever."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from opt_parallel.config.model import ModelConfig
from opt_parallel.data.encode.tokenizer import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer
from opt_parallel.huggingface.tokenizer import files_for, read_tokenizer, write_tokenizer
from opt_parallel.huggingface.tokenizer_trial import require_bounded
from opt_parallel.runtime.errors import UserError

WORDS = ["the cat sat on the mat and the dog sat on the cat", "déjà vu, 日本 🙂"]
TEXTS = [
    *WORDS, "<|user|> hi<|end|>", " <|user|>", "a</s>b<pad> <s>", "<|endoftext|> x", "[PAD] y", "<x1> <x2>",
    "The  Cat\n\n<|user|>the",
]  # fmt: skip
USER, END = "<|user|>", "<|end|>"


def trained(size: int = 300) -> Tokenizer:
    return train_tokenizer(WORDS, size)


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def flags(content: str, special: bool = True, **more: bool) -> dict[str, Any]:
    others = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **others, "special": special, **more}


# ---- folders of tokenizers, as they are found

SETTINGS = {
    "tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>",
    "pad_token": "<pad>", "add_bos_token": True, "model_max_length": 77,
}  # fmt: skip


def vocabulary(folder: Path, settings: dict[str, Any]) -> int:
    """OPT's files of old, and the number of their words."""
    tokenizer = trained()
    tokenizer.model.save(str(folder))
    write(folder, "tokenizer_config.json", settings)
    return tokenizer.get_vocab_size()


def opt_of_old(folder: Path) -> None:
    """As facebook/opt-125m: tokens with flags in both files, no tokenizer.json."""
    token = {"__type": "AddedToken", **flags("</s>", normalized=True)}
    del token["special"]
    pad = {**token, "content": "<pad>"}
    vocabulary(folder, {**SETTINGS, "bos_token": token, "eos_token": token, "unk_token": token, "pad_token": pad})
    plain = {
        name: {key: value for key, value in token.items() if key != "__type"} for name in ("bos_token", "eos_token")
    }
    write(folder, "special_tokens_map.json", plain)


def added_beside(folder: Path) -> None:
    number = vocabulary(folder, {**SETTINGS, "additional_special_tokens": [USER]})
    write(folder, "added_tokens.json", {END: number + 1, USER: number})  # not in the order of their ids


def decoder_beside(folder: Path) -> None:
    number = vocabulary(folder, SETTINGS)
    decoder = {number: flags(USER), number + 1: flags(END, special=False, normalized=True), 1: flags("<pad>")}
    settings = {**SETTINGS, "added_tokens_decoder": decoder, "additional_special_tokens": [USER]}
    write(folder, "tokenizer_config.json", settings)
    write(folder, "added_tokens.json", {USER: number, END: number + 1})


def without_bos(folder: Path) -> None:
    vocabulary(folder, {**SETTINGS, "add_bos_token": False, "add_prefix_space": True})


def whole_file(folder: Path) -> None:
    tokenizer = trained()
    tokenizer.add_special_tokens([USER])
    tokenizer.add_tokens([AddedToken(END, normalized=False, lstrip=True)])
    save_tokenizer(tokenizer, folder)
    write(folder, "tokenizer_config.json", {**SETTINGS, "tokenizer_class": "PreTrainedTokenizerFast"})


def file_and_more(folder: Path) -> None:
    """What the settings add to tokenizer.json: a pad token, special tokens, another flag of one that is there."""
    tokenizer = trained()
    tokenizer.add_tokens([USER])
    save_tokenizer(tokenizer, folder)
    (folder / "special_tokens_map.json").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "[PAD]"}
    number = tokenizer.get_vocab_size()
    decoder = {number - 1: flags(USER, special=True), number: flags(END)}
    write(folder, "tokenizer_config.json", {**settings, "added_tokens_decoder": decoder, "mask_token": "<x1>",
                                            "additional_special_tokens": ["<x2>", END]})  # fmt: skip


def of_another_network(folder: Path) -> None:
    """GPT-2's kind: one special token of its own, in a tokenizer.json that transformers wrote."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(trained().model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|bos|>", "<|pad|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
        pad_token="<|pad|>", model_max_length=99, padding_side="left", additional_special_tokens=[USER],
    ).save_pretrained(folder)  # fmt: skip


def custom_token(folder: Path) -> None:
    vocabulary(folder, {**SETTINGS, "image_token": "<x1>", "extra_special_tokens": ["<x2>"]})


FOLDERS: list[Callable[[Path], None]] = [
    opt_of_old, added_beside, decoder_beside, without_bos, whole_file, file_and_more, of_another_network, custom_token,
]  # fmt: skip
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token")


def same(ours: Any, theirs: Any) -> None:
    """Two tokenizers of transformers say the same."""
    for role in (*ROLES, *(f"{role}_id" for role in ROLES), "model_max_length", "padding_side"):
        assert getattr(ours, role) == getattr(theirs, role), role
    assert set(ours.all_special_tokens) == set(theirs.all_special_tokens)
    assert len(ours) == len(theirs)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        ids = theirs(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("make", FOLDERS)
def test_tokens_are_transformers_and_what_is_kept_is_what_was_brought(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder, kept = tmp_path / "brought", tmp_path / "kept"
    folder.mkdir()
    make(folder)
    theirs, brought = auto(folder), read_tokenizer(str(folder))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert brought.tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert brought.tokenizer.encode(text).ids == theirs(text)["input_ids"], text
    for role in ("bos", "eos", "pad"):
        assert brought.ids.get(f"{role}_token_id") == getattr(theirs, f"{role}_token_id")
    write_tokenizer(brought, kept)
    same(auto(kept), theirs)
    again = read_tokenizer(str(kept))
    assert again.tokenizer.to_str() == brought.tokenizer.to_str()
    assert again.settings == {"clean_up_tokenization_spaces": False, **brought.settings}
    assert again.extra == brought.extra


@pytest.mark.parametrize("make", [*FOLDERS, None])
def test_what_is_exported_agrees_with_the_network(make: Callable[[Path], None] | None, tmp_path: Path) -> None:
    """Where the network pads with another token than the files say, or they say nothing; where they agree they stay."""
    if make is None:
        tokenizer = trained()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    else:
        make(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    brought, exported = read_tokenizer(str(tmp_path)), tmp_path / "exported"
    own = ModelConfig(**{"vocab_size": 400, **brought.ids})  # type: ignore[arg-type]
    if len(brought.ids) == 3:
        assert files_for(tmp_path, own) == files
    other = replace(own, pad_token_id=own.eos_token_id)
    exported.mkdir()
    for name, content in files_for(tmp_path, other).items():
        (exported / name).write_bytes(content)
    theirs = auto(exported)
    ids = [getattr(theirs, f"{role}_token_id") for role in ("bos", "eos", "pad")]
    assert ids == [other.bos_token_id, other.eos_token_id, other.pad_token_id]
    for text in TEXTS:
        assert theirs(text)["input_ids"] == brought.tokenizer.encode(text).ids
    write_tokenizer(brought.of_model(other), tmp_path / "kept")
    same(auto(tmp_path / "kept"), theirs)


def test_opts_own_tokenizer_is_what_it_was(tmp_path: Path) -> None:
    """To the byte: stores and checkpoints of earlier versions know it by its text."""
    opt_of_old(tmp_path)
    assert load_tokenizer(str(tmp_path)).to_str() == _as_before(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    assert load_tokenizer(str(tmp_path)).to_str() == _as_before(tmp_path)


def _as_before(folder: Path) -> str:
    from tokenizers import decoders, processors

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<pad>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    return tokenizer.to_str()


def test_ids_that_are_not_in_the_order_of_the_tokens_are_refused(tmp_path: Path) -> None:
    """The library numbers what is added as it comes; another id in the files would mean another row."""
    number = vocabulary(tmp_path, SETTINGS)
    for wrong in (number + 5, 3):
        write(tmp_path, "added_tokens.json", {USER: wrong})
        with pytest.raises(UserError, match=rf"<\|user\|>' the id {wrong}, but .* id is {number}"):
            read_tokenizer(str(tmp_path))


def test_a_class_that_is_not_gpt2s_needs_its_own_file(tmp_path: Path) -> None:
    vocabulary(tmp_path, {**SETTINGS, "tokenizer_class": "BartTokenizer"})
    with pytest.raises(UserError, match=r"BartTokenizer.*add the file tokenizer.json"):
        read_tokenizer(str(tmp_path))


def test_files_that_are_damaged_or_elsewhere(tmp_path: Path) -> None:
    whole_file(tmp_path)
    write(tmp_path, "added_tokens.json", {USER: trained().get_vocab_size()})
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        folder = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{name}")
        for content in ("{", "[]", "[" * 100_000, '{"a": 1, "a": 2}', "\xff", '{"added_tokens_decoder": 5}'):
            (folder / name).write_text(content, encoding="latin-1")
            if content.startswith('{"added') and name == "special_tokens_map.json":
                continue  # a key that says nothing there
            line = refused(folder)
            assert "cannot be read" in line or "has no tokens" in line or "takes" in line or "the id" in line, line
        (folder / name).unlink()
        (folder / name).symlink_to("/etc/hostname")
        assert "leads out of its folder" in refused(folder)
    (tmp_path / "special_tokens_map.json").unlink()
    for key, value in (("bos_token", {"a": 1}), ("added_tokens_decoder", {"x": flags(USER)})):
        write(tmp_path, "tokenizer_config.json", {**settings, key: value})
        assert "cannot be read" in refused(tmp_path)


def refused(folder: Path) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_tokenizer(str(folder))
    assert time.monotonic() - began < 60  # a trial's CPU time is bounded, on a machine that others use
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    return line


# ---- what takes for ever


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def swelling(kind: str, letter: str = "q") -> dict[str, Any]:
    part = {"type": "Replace", "pattern": {"String": letter}, "content": letter * 64}
    return {"type": "Sequence", kind: [part] * 40}


HOSTILE: dict[str, dict[str, Any]] = {
    "a regex that never ends": {"pre_tokenizer": split(r"(a+)+$")},
    "one among others": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"\w+"), split(r"(z+z+)+y")]}},
    "a regex in a normalizer": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(k+)+$"}, "content": "x"}},
    "a text that swells": {"normalizer": swelling("normalizers")},
    "a text that swells when decoded": {"decoder": swelling("decoders")},
    "no regex": {"pre_tokenizer": split("(")},
    "a table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "no model": {"model": {"type": "BPE"}},
    "no such part": {"normalizer": {"type": "Nonsense"}},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_tokenizer_that_would_take_for_ever(tmp_path: Path, what: str) -> None:
    content = json.loads(trained().to_str()) | HOSTILE[what]
    write(tmp_path, "tokenizer.json", content)
    refused(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    ],
)
def test_patterns_of_known_tokenizers_pass(pattern: str) -> None:
    """GPT-2's own and Llama 3's."""
    require_bounded(json.dumps(json.loads(trained().to_str()) | {"pre_tokenizer": split(pattern)}), "x")


def test_a_failure_that_is_no_exception_is_one_line() -> None:
    """A panic of the library's while a text is encoded, past the trial."""
    tokenizer = trained()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    with pytest.raises(UserError, match=r"data.tokenizer .*\(Onig: Regex search error"):
        encode_documents(tokenizer, ["a" * 40 + "b"])
    assert not tokenizer.encode_special_tokens


def test_a_vocabulary_of_one_huge_id(tmp_path: Path) -> None:
    from opt_parallel.data.encode.tokenizer import check_tokenizer

    content = json.loads(trained().to_str())
    content["model"]["vocab"]["cat!"] = 2**32 - 1
    write(tmp_path, "tokenizer.json", content)
    with pytest.raises(UserError, match=r"has 4294967296 tokens"):
        check_tokenizer(load_tokenizer(str(tmp_path)), "x", ModelConfig())
