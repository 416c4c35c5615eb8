"""OPTConfig: transformers' fields and defaults, its files, and what OPT cannot be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from opt_parallel import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, OPTModel
from opt_parallel.config.model import Activation, Init

SMALL: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32,
}  # fmt: skip
# fields of transformers' that differ, with the reason
EXCEPTIONS = {"transformers_version"}  # ours is not written by transformers


def test_every_default_is_transformers() -> None:
    from transformers import OPTConfig as Theirs

    ours, theirs = OPTConfig().to_dict(), Theirs().to_dict()
    assert ours.keys() == theirs.keys()
    assert {name for name in theirs if ours[name] != theirs[name]} == EXCEPTIONS
    for name in theirs.keys() - EXCEPTIONS:
        assert getattr(OPTConfig(), name) == getattr(Theirs(), name), name
    for name in ("num_labels", "name_or_path", "keys_to_ignore_at_inference", "use_cache"):
        assert getattr(OPTConfig(), name) == getattr(Theirs(), name), name


CHANGES: list[dict[str, Any]] = [
    {"word_embed_proj_dim": 24},
    {"do_layer_norm_before": False, "_remove_final_layer_norm": True, "enable_bias": False},
    {"layer_norm_elementwise_affine": False, "activation_function": "gelu_new", "init_std": 0.1},
    {"num_labels": 3, "problem_type": "multi_label_classification"},
    {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}},
    {"id2label": {"0": "a", "1": "b", "2": "c"}},
    {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "use_cache": False},
    {"dtype": "bfloat16"},
    {"torch_dtype": torch.float16},
    {"dropout": 0, "attention_dropout": 0.2, "layerdrop": 0.1, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 5},
    {"our_own": {"a": [1, None]}, "another": 2.5},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_files_go_both_ways(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import OPTConfig as Theirs

    ours, theirs = OPTConfig(**SMALL, **changes), Theirs(**SMALL, **changes)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / "config.json").read_text() == OPTConfig.from_dict(ours.to_dict()).to_json_string()
    read = Theirs.from_pretrained(tmp_path / "ours").to_dict()
    expected = theirs.to_dict()
    for name in read.keys() - {"transformers_version", "_name_or_path", "label2id"}:
        assert read[name] == expected[name], name
    assert OPTConfig.from_pretrained(tmp_path / "theirs") == ours
    assert copy.deepcopy(ours) == ours != OPTConfig(**{**SMALL, "vocab_size": 132})
    assert OPTConfig.from_dict(theirs.to_dict(), vocab_size=140).vocab_size == 140
    assert all(f'"{name}"' in repr(ours) for name in changes.keys() - {"num_labels", "torch_dtype", "_name_or_path"})


def test_what_the_file_holds_is_kept(tmp_path: Path) -> None:
    """Keys that OPT does not know reach a model's folder, labels that were edited too; a path does not."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(
        json.dumps({**SMALL, "model_type": "opt", "mine": 7, "do_sample": True})
    )
    config = OPTConfig.from_pretrained(tmp_path / "in", num_labels=3)
    model = OPTForSequenceClassification(config)
    model.config.id2label[1] = "perhaps"
    model.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(text)["mine"] == 7
    assert json.loads(text)["label2id"] == {"LABEL_0": 0, "perhaps": 1, "LABEL_2": 2}
    assert str(tmp_path) not in text
    assert OPTForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label[1] == "perhaps"


def test_labels_are_one_thing() -> None:
    config = OPTConfig()
    assert (config.num_labels, config.id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
    config.id2label = {0: "no", 1: "yes", 2: "?"}
    assert (config.num_labels, config.label2id) == (3, {"no": 0, "yes": 1, "?": 2})
    config.label2id = {"x": 1, "y": 0}
    assert config.id2label == {1: "x", 0: "y"}
    config.num_labels = 4
    assert config.id2label[3] == "LABEL_3"
    assert OPTConfig(label2id={"a": 0}).num_labels == 1
    assert OPTConfig.from_dict(config.to_dict(), num_labels=5).num_labels == 5
    assert OPTConfig.from_dict(config.to_dict(), id2label={0: "only"}).num_labels == 1


def test_network_and_back() -> None:
    config = OPTConfig(**SMALL, do_layer_norm_before=False, word_embed_proj_dim=24, activation_function="silu")
    network = config.network()
    assert network.init is Init.huggingface
    assert network.activation_function is Activation.silu
    assert network.hidden_size == 48
    assert OPTConfig.of(network) == config


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 50}, "hidden_size=50 is not divisible by num_attention_heads=12"),
    ({"hidden_size": "48"}, 'hidden_size="48" must be a whole number'),
    ({"activation_function": "swish2"}, "activation_function='swish2' is not one of relu, gelu, silu, gelu_new"),
    ({"dropout": 1.5}, "dropout=1.5 must be a probability"),
    ({"pad_token_id": 99_999}, "pad_token_id=99999 is not in the vocabulary: choose 0 to vocab_size − 1 = 50271"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported, only True"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
    ({"enable_bias": 1}, "enable_bias=1 must be true or false"),
    ({"num_labels": 0}, "num_labels=0 must be a whole number"),
    ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels=3, but id2label names 1 labels"),
    ({"id2label": {0: "a", 2: "b"}}, "must name the labels 0, 1, …"),
    ({"problem_type": "guess"}, "problem_type='guess' is not one of regression"),
    ({"problem_type": "single_label_classification", "num_labels": 1}, "set num_labels=2 or more"),
    ({"dtype": "int8"}, "dtype='int8' is not a dtype of weights"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=str)
def test_what_opt_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        OPTConfig(**changes)
    assert words in str(caught.value)


def test_a_function_is_an_activation(tmp_path: Path) -> None:
    ids = torch.arange(4, 14)[None]
    named = OPTModel(OPTConfig(**SMALL, activation_function="silu")).eval()
    given = OPTModel(OPTConfig(**SMALL, activation_function=F.silu)).eval()
    own = OPTModel(OPTConfig(**SMALL, activation_function=lambda hidden: hidden.relu() ** 2)).eval()
    with torch.no_grad():
        assert torch.equal(named(ids).last_hidden_state, given(ids).last_hidden_state)
        assert not torch.equal(named(ids).last_hidden_state, own(ids).last_hidden_state)
        assert torch.equal(copy.deepcopy(own)(ids).last_hidden_state, own(ids).last_hidden_state)
    assert "lambda" in repr(own.config)
    with pytest.raises(ValueError, match=r"is a function, which config\.json cannot hold: name one of relu"):
        own.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_saved_with_its_own_shape_only(tmp_path: Path) -> None:
    model = OPTForCausalLM(OPTConfig(**SMALL))
    model.config.hidden_size = 96
    with pytest.raises(ValueError, match=r"config\.hidden_size=96 is not the model's 48: restore it"):
        model.save_pretrained(tmp_path / "out")


def test_weights_are_drawn_as_documented() -> None:
    """As transformers draws them: N(0, init_std²), zero for biases and the padding row, ones for LayerNorms."""
    from transformers import OPTConfig as Theirs
    from transformers import OPTForSequenceClassification as Classifier

    big = {**SMALL, "hidden_size": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True, "init_std": 0.07}
    ours = OPTForSequenceClassification(OPTConfig(**big), seed=3).state_dict()
    theirs = Classifier(Theirs(**big)).state_dict()
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].shape == values.shape
        if values.numel() > 1000:
            # the deviation of n normal numbers has a relative error of 1 / √(2n), here at most 2 %: four times that
            assert float(ours[name].std()) == pytest.approx(0.07, rel=0.09), name
        elif "score" not in name:
            assert torch.equal(ours[name], values), name
    assert not ours["model.decoder.embed_tokens.weight"][1].any()
    again = OPTForSequenceClassification(OPTConfig(**big), seed=3).state_dict()
    other = OPTForSequenceClassification(OPTConfig(**big), seed=4).state_dict()
    assert all(torch.equal(values, again[name]) for name, values in ours.items())
    assert not torch.equal(ours["score.weight"], other["score.weight"])
    assert OPTModel(Theirs(**SMALL)).config == OPTConfig(**SMALL)  # transformers' configuration will do
    with pytest.raises(ValueError, match="config is a str: give an OPTConfig; to load a checkpoint by its name"):
        OPTModel("facebook/opt-125m")  # type: ignore[arg-type]


def test_no_token_need_be_padding(tmp_path: Path) -> None:
    """Then a classifier reads the last position, and every row of the embedding is random and trained."""
    from transformers import OPTConfig as Theirs
    from transformers import OPTForSequenceClassification as Classifier

    ours = OPTForSequenceClassification(OPTConfig(**SMALL, pad_token_id=None, dropout=0.0))
    theirs = Classifier(Theirs(**SMALL, pad_token_id=None, dropout=0.0))
    embedding = ours.get_input_embeddings()
    assert bool(embedding.weight.any(dim=1).all())
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[5, 1, 0, 1]])  # transformers refuses a batch
    for model in (ours, theirs):
        model(ids, labels=torch.tensor([1])).loss.backward()
    torch.testing.assert_close(embedding.weight.grad, theirs.get_input_embeddings().weight.grad)
    assert bool(embedding.weight.grad[0].any())
    assert ours(ids.expand(2, 4)).logits.shape == (2, 2)
    ours.resize_token_embeddings(140)
    assert ours.get_input_embeddings().pad_token_id == -1
    ours.save_pretrained(tmp_path / "out")
    assert OPTForSequenceClassification.from_pretrained(tmp_path / "out").config.pad_token_id is None
    assert (embedding.num_embeddings, embedding.embedding_dim) == (131, 48)
