"""The network is transformers' OPT: losses and all gradients, every variant, at tensor 1 and 2, and with sequence
parallelism at 2 and 4."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import assemble
from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "post-norm": {"do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 24},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "gelu": {"activation_function": "gelu"},
    "silu": {"activation_function": "silu"},
    "gelu_new": {"activation_function": "gelu_new"},
}
SHAPE = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.2,
}  # fmt: skip
# one forward and backward apart from the order of sums: float32 carries 7 digits, float64 16
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


def ids_and_mask(padding: str) -> tuple[Tensor, Tensor | None]:
    length = 19  # neither 2 nor 4 divides it
    ids = torch.randint(0, SHAPE["vocab_size"], (3, length), generator=torch.Generator().manual_seed(5))
    ids[1, 7] = 1  # the pad id as a real token: its look-up must get no gradient, its logit one
    if padding == "none":
        return ids, None
    mask = torch.ones_like(ids)
    hidden = {"left": (slice(None, 6),), "right": (slice(-6, None),), "inner": (slice(4, 9),)}[padding]
    for part in hidden:
        mask[0, part] = 0
        ids[0, part] = 1
    return ids, mask


def next_labels(ids: Tensor, mask: Tensor | None) -> Tensor:
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    if mask is not None:
        labels[(mask == 0) | (mask.roll(-1, dims=1) == 0)] = -100
    return labels


def ours(folder: str, dtype: str, padding: str, tensor: int, sequence: bool) -> tuple[float, dict[str, Any]]:
    """On the crew: loss and this rank's part of every gradient. The network has no dropout."""
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.parallel.random import Draw
    from opt_parallel.parallel.shard import marked
    from opt_parallel.parallel.topology import Topology

    ids, mask = ids_and_mask(padding)
    labels = next_labels(ids, mask)
    with Topology.open(tensor) as topology:
        model = open_checkpoint(Path(folder)).model(topology.tensor, torch.device("cpu"), getattr(torch, dtype))
        model.decoder.sequence = sequence
        draw = Draw(seed=0, step=0, micro=0, data_rank=0, samples=torch.arange(len(ids)))
        loss = model(ids, labels, segments=mask, draw=draw) / int((labels != -100).sum())
        loss.backward()
        gradients = {
            name: (shard.shape, shard.range, tensor.grad[shard.real].numpy()) for name, tensor, shard in marked(model)
        }
    return loss.item(), gradients


def theirs(variant: dict[str, Any], dtype: str, padding: str, folder: Path) -> tuple[float, dict[str, Tensor]]:
    """Write a random transformers model to `folder`; its loss and gradients, under our names."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    config = OPTConfig(**{**SHAPE, **variant})
    model = OPTForCausalLM._from_config(config, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)  # biases and LayerNorms away from 0 and 1
    model.save_pretrained(folder)
    ids, mask = ids_and_mask(padding)
    labels = next_labels(ids, mask)
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in model.named_parameters()}


def compare(
    crew: Any, variant: str, dtype: str, padding: str, tensor: int, folder: Path, sequence: bool = False
) -> None:
    from opt_parallel.huggingface.names import hf_names

    expected_loss, expected = theirs(VARIANTS[variant], dtype, padding, folder)
    answers = crew(tensor)(ours, str(folder), dtype, padding, tensor, sequence)
    assert [loss for loss, _ in answers] == pytest.approx([expected_loss] * tensor, rel=TOLERANCE[dtype])
    gradients = assemble([parts for _, parts in answers])
    square_difference, square_norm, seen = 0.0, 0.0, set()
    for name, gradient in gradients.items():
        names = hf_names(name)
        seen.update(names)
        whole = expected[names[0]] if len(names) == 1 else torch.stack([expected[part] for part in names])
        square_difference += float(((gradient - whole) ** 2).sum())
        square_norm += float((whole**2).sum())
    assert seen == expected.keys()
    assert square_difference**0.5 <= TOLERANCE[dtype] * square_norm**0.5


# by default each variant in float64 on two ranks, and one variant each in two of the other combinations
DEFAULT = {("float64", 2): VARIANTS.keys(), ("float64", 1): {"pre-norm"}, ("float32", 2): {"350m"}, ("float32", 1): {}}


@pytest.mark.parametrize(
    ("variant", "dtype", "tensor"),
    [
        pytest.param(variant, dtype, tensor, marks=[pytest.mark.long] * (variant not in chosen))
        for (dtype, tensor), chosen in DEFAULT.items()
        for variant in VARIANTS
    ],
)
def test_loss_and_gradients(crew: Any, tmp_path: Path, variant: str, dtype: str, tensor: int) -> None:
    compare(crew, variant, dtype, "none", tensor, tmp_path)


# by default two paddings each on two ranks; with padding inside, 350m is a test of sequence parallelism
PADDED = {("pre-norm", "left", 2), ("pre-norm", "inner", 2), ("350m", "right", 2), ("350m", "left", 2)}


@pytest.mark.parametrize(
    ("variant", "padding", "tensor"),
    [
        pytest.param(*case, marks=[pytest.mark.long] * (case not in PADDED))
        for case in itertools.product(("pre-norm", "350m"), ("left", "right", "inner"), (1, 2))
    ],
)
def test_padding(crew: Any, tmp_path: Path, variant: str, padding: str, tensor: int) -> None:
    compare(crew, variant, "float64", padding, tensor, tmp_path)


@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=[] if each in ("pre-norm", "350m") else pytest.mark.long) for each in VARIANTS]
)
def test_sequence_parallelism(crew: Any, tmp_path: Path, variant: str, tensor: int) -> None:
    compare(crew, variant, "float64", "inner", tensor, tmp_path, sequence=True)


def logits_of_padding(folder: str) -> bool:
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.parallel.topology import ALONE

    ids, _ = ids_and_mask("none")
    segments = torch.ones_like(ids)
    segments[0] = 0
    logits = open_checkpoint(Path(folder)).model(ALONE, torch.device("cpu"))(ids, segments=segments)
    return bool(logits.isfinite().all())


def test_a_fully_padded_row_gives_no_nan(crew: Any, tmp_path: Path) -> None:
    theirs({}, "float32", "none", tmp_path)
    assert crew(1)(logits_of_padding, str(tmp_path)) == [True]
