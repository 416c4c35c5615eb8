"""Tokenizers load from what users have, are trained alike every time, and open in transformers as OPT's do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from opt_parallel.config.data import SpecialTokens
from opt_parallel.config.model import Labels, ModelConfig, ProblemType
from opt_parallel.config.task import TaskConfig
from opt_parallel.data.encode.classify import LabelledEncoder
from opt_parallel.data.encode.finetune import ExampleEncoder
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.encode.tokenizer import (
    check_tokenizer,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from opt_parallel.data.text.records import Record
from opt_parallel.runtime.errors import UserError

TEXT = ["the cat sat on the mat and the dog sat on the cat", "  déjà vu, 日本 🙂\n\n\tthe end"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXT, 300)


def model(**values: int) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 300, **values})  # type: ignore[arg-type]


def test_trained_tokenizer_has_opt_special_ids_and_is_the_same_each_time(trained: Tokenizer) -> None:
    assert [trained.id_to_token(number) for number in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert trained.get_vocab_size() <= 300
    assert train_tokenizer(TEXT, 300).to_str() == trained.to_str()


def test_any_text_comes_back_whole(trained: Tokenizer) -> None:
    for text in (*TEXT, "\x00 never seen: ß\r\n"):
        assert trained.decode(encode_documents(trained, [text])[0]) == text


def test_a_prompt_starts_with_the_end_token_and_a_document_with_its_text(trained: Tokenizer) -> None:
    assert trained.encode("the cat").ids[0] == 2
    assert [2, *encode_documents(trained, ["the cat"])[0]] == trained.encode("the cat").ids


def test_text_that_spells_a_special_token_stays_text(trained: Tokenizer) -> None:
    ids = encode_documents(trained, ["a</s>b<pad>"])[0]
    assert not {0, 1, 2, 3} & set(ids)
    assert trained.decode(ids) == "a</s>b<pad>"
    assert 2 in trained.encode("a</s>b").ids[1:]  # and encoding elsewhere is as it was


def test_one_rule_for_documents_and_prompts(trained: Tokenizer) -> None:
    text, spelled = "a</s>b<pad>", SpecialTokens.tokens
    as_text = encode_documents(trained, [text])[0]
    as_tokens = encode_documents(trained, [text], spelled)[0]
    assert as_tokens == [trained.token_to_id("a"), 2, trained.token_to_id("b"), 1]
    assert encode_prompt(trained, text, model()) == [2, *as_text]
    assert encode_prompt(trained, text, model(), spelled) == [2, *as_tokens]
    trained.add_tokens(["<|user|>"])
    try:  # of a word that was added, and is not special, there is no doubt
        for rule in SpecialTokens:
            assert trained.token_to_id("<|user|>") in encode_documents(trained, ["a<|user|>"], rule)[0]
    finally:
        assert trained.token_to_id("<|user|>") == trained.get_vocab_size() - 1


def test_every_task_goes_by_the_rule_and_its_store_by_another_name() -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    record = Record("line 1", {"text": "the</s>cat", "prompt": "the</s>", "completion": " cat</s>", "label": "x"})
    labels = Labels(("x", "y"), ProblemType.single_label_classification)

    def encoders(spelled: SpecialTokens) -> list[Any]:
        return [
            TextEncoder(tokenizer, 2, None, spelled),
            ExampleEncoder(tokenizer, 2, TaskConfig(), 32, spelled),
            LabelledEncoder(tokenizer, 2, "text", TaskConfig(), labels, 32, spelled),
        ]

    for as_text, as_tokens, ends in zip(*map(encoders, SpecialTokens), (1, 2, 1), strict=True):
        counts = [each.encode([record]).columns["ids"].tolist().count(2) for each in (as_text, as_tokens)]
        assert counts == [ends, ends + (2 if isinstance(as_text, ExampleEncoder) else 1)]
        assert as_text.identity() != as_tokens.identity()
    assert TextEncoder(tokenizer, 2).identity() == ["text", tokenizer.to_str(), 2, "text", None]  # as ever


@pytest.mark.parametrize("beside", [None, {"model_type": "opt"}])
def test_transformers_loads_what_is_saved(trained: Tokenizer, tmp_path: Path, beside: dict[str, str] | None) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(trained, tmp_path)
    if beside:  # an exported model's config.json names a tokenizer class of its own
        (tmp_path / "config.json").write_text(json.dumps(beside))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXT, "a</s>b"):
        assert theirs(text)["input_ids"] == trained.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (2, 2, 1, 3)
    assert theirs.decode(trained.encode(TEXT[1]).ids, skip_special_tokens=True) == TEXT[1]


def test_a_saved_folder_loads_again(trained: Tokenizer, tmp_path: Path) -> None:
    trained.enable_truncation(2)
    try:
        save_tokenizer(trained, tmp_path)
    finally:
        trained.no_truncation()
    assert load_tokenizer(str(tmp_path)).to_str() == trained.to_str()  # and no file's truncation cuts documents


def test_vocabulary_and_merges_of_opt(trained: Tokenizer, tmp_path: Path) -> None:
    trained.model.save(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(TEXT[0]).ids == trained.encode(TEXT[0]).ids
    assert encode_documents(loaded, TEXT) == encode_documents(trained, TEXT)
    assert 0 not in loaded.encode("<s>").ids  # OPT's own marks `<pad>` and `</s>` alone as special


def test_vocabulary_without_the_end_token(tmp_path: Path) -> None:
    models.BPE({"a": 0, "b": 1}, []).save(str(tmp_path))
    with pytest.raises(UserError, match=r"vocab.json has no token <pad>"):
        load_tokenizer(str(tmp_path))


def test_folders_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer.json nor vocab.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **_: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"tokenizer=some/where is not a local folder.*no route; to host") as raised:
        load_tokenizer("some/where")
    assert "\n" not in str(raised.value)


def test_a_hub_id(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(trained, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert load_tokenizer("some/where").to_str() == trained.to_str()


def test_too_small_a_vocabulary_to_train() -> None:
    with pytest.raises(UserError, match=r"model.vocab_size=259 .* choose 260 or more"):
        train_tokenizer(TEXT, 259)
    assert train_tokenizer(TEXT, 260).get_vocab_size() == 260


def test_tokenizer_and_model_must_agree(trained: Tokenizer) -> None:
    size = trained.get_vocab_size()
    check_tokenizer(trained, "x", model(vocab_size=size))
    with pytest.raises(UserError, match=f"has {size} tokens, .*model.vocab_size={size - 1} rows"):
        check_tokenizer(trained, "x", model(vocab_size=size - 1))
    with pytest.raises(UserError, match=r"set model.eos_token_id=2"):
        check_tokenizer(trained, "x", model(eos_token_id=3))


def test_the_end_token_must_be_a_special_one() -> None:
    other = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    other.add_special_tokens(["<|endoftext|>"])
    with pytest.raises(UserError, match=r"model.eos_token_id=2 is not a special token of .* 3 \(<\|endoftext\|>\)"):
        check_tokenizer(other, "x", model())
    check_tokenizer(other, "x", model(eos_token_id=3))
