"""Calls mistyped on purpose: each ends with one line that names the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opt_parallel import OPTConfig, OPTForCausalLM, OPTForSequenceClassification
from opt_parallel.runtime.errors import UserError

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip
IDS = torch.arange(4, 24).view(2, 10)


@pytest.fixture(scope="module")
def models() -> tuple[OPTForCausalLM, OPTForSequenceClassification]:
    return OPTForCausalLM(OPTConfig(**SHAPE)).eval(), OPTForSequenceClassification(OPTConfig(**SHAPE)).eval()


# of the language model's forward
FORWARD: list[tuple[dict[str, Any], str]] = [
    ({"atention_mask": IDS}, "unexpected keyword argument 'atention_mask'"),
    ({}, "give exactly one of input_ids and inputs_embeds: neither was given"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 10, 48)}, "exactly one of input_ids and inputs_embeds: both"),
    ({"input_ids": IDS.float()}, "input_ids has dtype float32: token ids are int64 (torch.long)"),
    ({"input_ids": [[4, 5]]}, "input_ids is a list: give a tensor of token ids"),
    ({"input_ids": IDS + 120}, "input_ids holds ids from 124 to 143, outside 0 to vocab_size − 1 = 130"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "input_ids is (2, 0)"),
    ({"input_ids": torch.full((1, 33), 5)}, "33 tokens are more than max_position_embeddings=32"),
    ({"inputs_embeds": torch.zeros(2, 10, 24)}, "inputs_embeds is (2, 10, 24), not (batch, positions, 48)"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 9)}, "attention_mask is (2, 9), not (batch, keys) = (2, 10)"),
    ({"input_ids": IDS, "attention_mask": IDS}, "attention_mask holds values other than 1"),
    ({"input_ids": IDS, "head_mask": torch.ones(3)}, "head_mask is (3,), not (layers, heads) = (2, 4)"),
    ({"input_ids": IDS, "position_ids": IDS + 20}, "position_ids holds positions outside 0 to"),
    ({"input_ids": IDS, "labels": IDS + 120}, "labels (besides −100) holds ids from 124 to 143, outside 0 to"),
    ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels is (2, 9), and the input (2, 10): one label for each token"),
    ({"input_ids": IDS, "past_key_values": "cache"}, "past_key_values is a str: give that of an earlier output"),
    ({"input_ids": IDS, "past_key_values": ((IDS, IDS),) * 2}, "each layer is a pair of keys and values"),
    ({"input_ids": IDS, "past_key_values": ((torch.zeros(2, 4, 3, 12),) * 2,)}, "has 1 layers, and the model 2"),
    ({"input_ids": IDS, "past_key_values": ((torch.zeros(1, 4, 3, 12),) * 2,) * 2}, "1 sequences, and the input has 2"),
    ({"input_ids": IDS, "past_key_values": ((torch.zeros(2, 3, 3, 12),) * 2,) * 2}, "3 heads of width 12, not 4"),
]


@pytest.mark.parametrize(("arguments", "words"), FORWARD, ids=lambda each: str(each)[:30])
def test_forward(models: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^[^\n]+$") as caught:
        models[0](**arguments)
    assert words in str(caught.value)


LABELS: list[tuple[torch.Tensor, str | None, str]] = [
    (torch.tensor([0, 3]), None, "labels holds 3, outside 0 to num_labels − 1 = 2"),
    (torch.tensor([0, 1, 2]), None, "labels is (3,) of int64: a single label is one integer for each of 2 sequences"),
    (torch.tensor([0.5, 1]), "single_label_classification", "a single label is one integer"),
    (torch.ones(2), "multi_label_classification", "labels is (2,), not (batch, num_labels) = (2, 3)"),
    (torch.ones(2, 2), "regression", "labels is (2, 2), not (batch, num_labels) = (2, 3)"),
]


@pytest.mark.parametrize(("labels", "problem_type", "words"), LABELS, ids=str)
def test_labels(models: Any, labels: torch.Tensor, problem_type: str | None, words: str) -> None:
    models[1].config.problem_type = problem_type
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        models[1](IDS, labels=labels)
    assert words in str(caught.value)


def test_from_pretrained(models: Any, tmp_path: Path) -> None:
    models[1].config.problem_type = None
    models[1].save_pretrained(tmp_path / "model")
    calls: list[tuple[type, str | Path, dict[str, Any], str]] = [
        (OPTForCausalLM, tmp_path / "modle", {}, "modle does not exist"),
        (OPTForCausalLM, tmp_path / "model", {}, "is a classifier (score.weight is unexpected)"),
        (OPTForSequenceClassification, tmp_path / "model", {"num_label": 2}, "has no argument num_label"),
        (OPTForSequenceClassification, tmp_path / "model", {"num_labels": 2}, "score.weight has shape (3, 48), not (2"),
        (OPTForSequenceClassification, tmp_path / "model", {"dtype": "float33"}, "dtype='float33' is not a dtype"),
        (OPTForSequenceClassification, tmp_path / "model", {"from_tf": True}, "it has none of tf_model.h5"),
        (
            OPTForCausalLM,
            tmp_path / "model",
            {"from_tf": True, "from_flax": True},
            "tf_model.h5 and flax_model.msgpack",
        ),
        (OPTForSequenceClassification, tmp_path / "model", {"hidden_size": 96, "word_embed_proj_dim": 96}, "not (96"),
    ]
    for kind, name, arguments, words in calls:
        with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
            kind.from_pretrained(name, **arguments)
        assert words in str(caught.value)
    again = OPTForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2, ignore_mismatched_sizes=True)
    assert again(IDS).logits.shape == (2, 2)
