"""Names, shapes and config.json: what is there, what is missing, and what would change the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import SHAPE, VARIANTS, logits_of, random_model, some_ids
from safetensors.torch import load_file, save_file

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.model import Labels, ModelConfig, ProblemType
from opt_parallel.huggingface.config import read_config, read_labels
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime.errors import UserError

CPU = torch.device("cpu")


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def error_of(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model().save_pretrained(tmp_path)
    return tmp_path


def tensors_changed(folder: Path, change_them: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change_them(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["OPTModel", "OPTForCausalLM"])
@pytest.mark.parametrize("variant", ["pre-norm", "350m"])
def test_a_bare_decoder_is_the_same_model(tmp_path: Path, kind: str, variant: str) -> None:
    model = random_model(VARIANTS[variant])
    (model.model if kind == "OPTModel" else model).save_pretrained(tmp_path)
    ours = open_checkpoint(tmp_path).model(ALONE, CPU)
    torch.testing.assert_close(ours(some_ids()), logits_of(model), rtol=0, atol=1e-5)  # fp32 sums in another order


def test_all_wrong_names_stand_in_one_line(folder: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        del tensors["model.decoder.layers.0.fc1.weight"]
        tensors["model.decoder.layers.7.fc1.weight"] = torch.zeros(2)
        tensors["model.decoder.layers.1.fc2.bias"] = torch.zeros(5)

    tensors_changed(folder, spoil)
    line = error_of(lambda: open_checkpoint(folder).model(ALONE, CPU))
    assert "layers.0.fc1.weight is missing" in line
    assert "layers.7.fc1.weight is unexpected" in line
    assert "layers.1.fc2.bias has shape (5,), not (48,)" in line
    change(folder, num_hidden_layers=3)  # 16 tensors more
    line = error_of(open_checkpoint(folder).check_language_model)
    assert line.count(";") == 4
    assert line.endswith("and 14 more")  # 16 + 3 wrong, 5 of them named


def test_known_extras_are_left_alone_and_a_head_must_be_tied(folder: Path) -> None:
    embedding = "model.decoder.embed_tokens.weight"

    def add(tensors: dict[str, Any]) -> None:
        tensors["model.decoder.version"] = torch.tensor([3.0])
        tensors[embedding][1, 2] = float("nan")  # no reason to call the head another
        tensors["lm_head.weight"] = tensors[embedding].clone()

    def untie(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"][100, 3] += 0.5

    tensors_changed(folder, add)
    open_checkpoint(folder).model(ALONE, CPU)
    tensors_changed(folder, untie)
    assert "a separate output projection" in error_of(lambda: open_checkpoint(folder).model(ALONE, CPU))
    tensors_changed(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, 48)}))
    assert "lm_head.weight has shape (7, 48)" in error_of(lambda: open_checkpoint(folder).model(ALONE, CPU))


def test_values_that_are_not_finite_are_named(folder: Path, capsys: Any) -> None:
    open_checkpoint(folder).model(ALONE, CPU)
    assert capsys.readouterr().out == ""

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.decoder.layers.1.self_attn.v_proj.weight"][4, 5] = float("nan")
        tensors["model.decoder.layers.0.fc2.bias"][3] = float("-inf")

    tensors_changed(folder, spoil)
    open_checkpoint(folder).model(ALONE, CPU)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "decoder.layers.0.fc2.bias, decoder.layers.1.self_attn.qkv_proj.weight\n" in out


def test_classifiers(tmp_path: Path, folder: Path, capsys: Any) -> None:
    model = random_model({"num_labels": 3}, kind="OPTForSequenceClassification")
    model.save_pretrained(tmp_path / "classes")
    opened = open_checkpoint(tmp_path / "classes")
    ours = opened.classifier(3, ALONE, CPU)(some_ids())
    torch.testing.assert_close(ours, logits_of(model), rtol=0, atol=1e-5)  # fp32 sums in another order
    torch.testing.assert_close(opened.classifier(3, ALONE, CPU, new_head=True)(some_ids()), ours)
    assert "score.weight has shape (3, 48), not (2, 48)" in error_of(lambda: opened.classifier(2, ALONE, CPU))
    assert "score.weight is unexpected" in error_of(lambda: opened.model(ALONE, CPU))

    language = open_checkpoint(folder)
    assert "score.weight is missing" in error_of(lambda: language.classifier(2, ALONE, CPU))
    assert capsys.readouterr().out == ""
    heads = [language.classifier(2, ALONE, CPU, new_head=True, seed=seed).score.weight for seed in (1, 1, 2)]
    assert "randomly initialised with seed 1" in capsys.readouterr().out
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.1 < float(heads[0].detach().std()) < 0.3  # init_std of the checkpoint: 0.2


def test_a_config_of_the_hub_is_read(folder: Path) -> None:
    """The fields of published files that OPTConfig has no longer, at the values they have there."""
    change(
        folder, activation_dropout=0.0, prefix="</s>", torch_dtype="float16", scale_embeddings=False,
        learned_embeddings=True, _name_or_path="opt", architectures=["OPTForCausalLM"],
    )  # fmt: skip
    assert read_config(folder).num_hidden_layers == 2


def test_every_field_transformers_writes_is_known(tmp_path: Path) -> None:
    from transformers import OPTConfig

    (tmp_path / "config.json").write_text(json.dumps(OPTConfig(**SHAPE).to_dict()))
    expected = {**SHAPE, "attention_dropout": 0.0, "word_embed_proj_dim": 48}
    assert read_config(tmp_path) == ModelConfig(**expected)
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')  # OPTConfig's defaults
    assert read_config(tmp_path) == ModelConfig(attention_dropout=0.0, init_std=0.02)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"model_type": "gpt2"}, ["model_type is 'gpt2'"]),
    ({"tie_word_embeddings": False}, ["tie_word_embeddings=False", "only True"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"scale_embedding": True}, ["scale_embedding=True"]),
    ({"activation_dropout": 0.1}, ["activation_dropout=0.1"]),
    ({"is_encoder_decoder": True}, ["is_encoder_decoder"]),
    ({"num_experts": 8, "rope_theta": 1e4}, ["num_experts, rope_theta may change the network"]),
    ({"activation_function": "swiglu"}, ["'swiglu'", "gelu_new"]),
    ({"activation_function": ["relu"]}, ["['relu']", "gelu_new"]),
    ({"hidden_size": "64"}, ['hidden_size="64"', "whole number"]),
    ({"hidden_size": 48.0}, ["hidden_size=48.0", "whole number"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers=true", "whole number"]),
    ({"enable_bias": 1}, ["enable_bias=1", "true or false"]),
    ({"dropout": None}, ["dropout=null", "a number"]),
    ({"word_embed_proj_dim": "24"}, ["word_embed_proj_dim", "or null"]),
    ({"num_attention_heads": 5}, ["num_attention_heads=5", "not divisible"]),
    ({"eos_token_id": [2, 50118]}, ["eos_token_id=[2, 50118]"]),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids="-".join)
def test_a_config_that_is_not_this_network_is_refused(folder: Path, fields: Any, words: list[str]) -> None:
    change(folder, **fields)
    line = error_of(lambda: read_config(folder))
    assert str(folder) in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'"opt"', b""])
def test_garbage_is_no_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "is not a checkpoint" in error_of(lambda: open_checkpoint(folder))


def test_labels(folder: Path) -> None:
    assert read_labels(folder) == Labels(("LABEL_0", "LABEL_1"), None)
    names = {"10": "k", **{str(label): "abcdefghij"[label] for label in range(10)}}
    change(folder, id2label=names, problem_type="multi_label_classification")
    assert read_labels(folder) == Labels(tuple("abcdefghijk"), ProblemType.multi_label_classification)
    for fields, word in (
        ({"id2label": {"0": "no", "2": "yes"}}, "id2label"),
        ({"id2label": None, "num_labels": "3"}, 'num_labels="3"'),
        ({"problem_type": "guess"}, "problem_type='guess'"),
    ):
        change(folder, **{"id2label": {"0": "no"}, "problem_type": None, "num_labels": 1, **fields})
        assert word in error_of(lambda: read_labels(folder))


@pytest.mark.parametrize("degree", [3, 5])
def test_a_tensor_degree_that_does_not_fit_is_said_before_anything_is_read(folder: Path, degree: int) -> None:
    group = Group(None, 0, degree)
    opened = open_checkpoint(folder)
    for call in (lambda: opened.model(group, CPU), lambda: opened.classifier(2, group, CPU, new_head=True)):
        line = error_of(call)
        assert f"model.num_attention_heads=4 is not divisible by tensor degree {degree}" in line


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64"])
def test_numbers_that_are_no_weights(folder: Path, dtype: str) -> None:
    name = "model.decoder.layers.0.fc1.weight"
    tensors_changed(folder, lambda tensors: tensors.update({name: tensors[name].to(getattr(torch, dtype))}))
    line = error_of(lambda: open_checkpoint(folder).model(ALONE, CPU))
    assert f"{name} is {dtype}" in line


@pytest.mark.parametrize("content", ["[]", '{"name": "of a web page"}'])
def test_a_manifest_that_is_not_ours(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    line = error_of(lambda: open_checkpoint(folder))
    assert str(folder) in line
    assert "remove manifest.json" in line
