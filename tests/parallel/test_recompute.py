"""Recomputation: the same bits, no collective more than needed, and the memory that each mode keeps."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from layouts import STYLE_350M, TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opt_parallel.config.model import Activation, ModelConfig
from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.config.task import LoraConfig
from opt_parallel.model.build import network
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.recompute import HostInputs, recomputed
from opt_parallel.parallel.shard import fill, random_source
from opt_parallel.parallel.topology import ALONE, Group

MODES = list(ActivationCheckpointing)
ROWS, LENGTH = 2, 16


def model_of(
    mode: ActivationCheckpointing,
    changes: dict[str, Any],
    group: Group = ALONE,
    lora: LoraConfig | None = None,
    sequence: bool = False,
) -> CausalLM:
    model = network(ModelConfig(**{**TINY, **changes}), lora or LoraConfig(), None, group, mode, sequence)
    assert isinstance(model, CausalLM)
    fill(model, random_source(1), torch.device("cpu"), torch.float32)
    return model


def loss_of(model: CausalLM) -> Tensor:
    ids = torch.arange(5, 5 + ROWS * LENGTH).view(ROWS, LENGTH)
    return model(ids, ids, draw=Draw(seed=1, step=0, micro=0, data_rank=0, samples=torch.arange(ROWS)))


VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {"layerdrop": 0.3, "attention_dropout": 0.1},
    "gelu": {"activation_function": Activation.gelu},
    "silu": {"activation_function": Activation.silu},
    "gelu_new, no biases": {"activation_function": Activation.gelu_new, "enable_bias": False},
    "350m": STYLE_350M,
}


@pytest.mark.parametrize(
    ("variant", "rank"),
    [
        ("standard", 0), ("standard", 4), ("gelu", 4), ("silu", 0), ("gelu_new, no biases", 4), ("350m", 0),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (("gelu", 0), ("silu", 4), ("gelu_new, no biases", 0), ("350m", 4))
        ),
    ],
)  # fmt: skip
def test_every_mode_computes_the_same_bits(variant: str, rank: int) -> None:
    lora = LoraConfig(rank=rank, targets=["q_proj", "v_proj", "out_proj", "fc1", "fc2"])
    results = []
    for mode in MODES:
        model = model_of(mode, VARIANTS[variant], lora=lora)
        loss = loss_of(model)
        loss.backward()
        results.append((loss.detach(), [tensor.grad for tensor in model.parameters() if tensor.grad is not None]))
    (expected, gradients), *others = results
    assert len(gradients) > 20
    for found, there in others:
        assert torch.equal(found, expected)
        assert len(there) == len(gradients)
        assert all(torch.equal(one, other) for one, other in zip(there, gradients, strict=True))


class Watch(TorchDispatchMode):
    """Counts the collectives of two ranks by phase, each as 2, and knows the storages that operations have made and
    that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.collectives, self.alive = "forward", Counter[str](), {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if "c10d" in name and ("reduce" in name or "gather" in name or "alltoall" in name):
            self.collectives[self.phase] += 2
        elif "c10d.broadcast" in name:
            self.collectives[self.phase] += 1  # on CPUs, two ranks gather by two broadcasts
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        return result


def collectives(layers: int, mode: ActivationCheckpointing, changes: dict[str, Any], sequence: bool) -> dict[str, int]:
    from opt_parallel.parallel.topology import Topology

    with Topology.open(2) as topology:
        model = model_of(mode, {"num_hidden_layers": layers, **changes}, topology.tensor, sequence=sequence)
        with Watch() as watch:
            loss = loss_of(model)
            watch.phase = "backward"
            loss.backward()
    return dict(watch.collectives)


@pytest.mark.parametrize(
    ("changes", "sequence", "mode", "again"),
    [
        pytest.param({}, False, "full", 1, marks=pytest.mark.long),
        (STYLE_350M, False, "full", 2),
        ({}, True, "full", 3),
        ({}, True, "selective", 1),
    ],
)
def test_recomputation_repeats_only_the_collectives_that_it_must(
    crew: Any, changes: Any, sequence: bool, mode: str, again: int
) -> None:
    """The sum after attention is needed for the rest of the layer. The one after the feed-forward is needed only by a
    LayerNorm behind it. With sequence parallelism, both column-parallel layers gather their inputs again."""
    modes = (ActivationCheckpointing.none, ActivationCheckpointing(mode))
    plain, found = (crew(2)(collectives, 2, each, changes, sequence)[0] for each in modes)
    assert found == {"forward": plain["forward"], "backward": plain["backward"] + 2 * 2 * again}


def test_inputs_on_the_host_come_back_one_ahead() -> None:
    inputs, tensors = HostInputs(), [torch.full((4,), float(n), requires_grad=True) for n in range(3)]
    squares = [recomputed(torch.square, tensor, inputs=inputs) for tensor in tensors]
    last = inputs.last
    assert last is not None
    middle = last.earlier
    assert middle is not None
    first = middle.earlier
    assert first is not None
    assert first.earlier is None
    assert first.tensor is None is middle.tensor, "an earlier input stays on the device"
    squares[2].sum().backward()
    assert middle.tensor is not None, "the next input is not on its way"
    assert last.tensor is None is first.tensor
    for square in squares[1::-1]:
        square.sum().backward()
    assert [tensor.grad.tolist() for tensor in tensors] == [[2.0 * n] * 4 for n in range(3)]  # type: ignore[union-attr]


STYLES: dict[str, dict[str, Any]] = {
    "relu": {}, "gelu": {"activation_function": Activation.gelu}, "350m": STYLE_350M
}  # fmt: skip


# Bytes that a layer keeps for its backward, as multiples of (B, S, H) in the model's dtype: a + b / t at tensor t.
# In every mode with b > 0: query, key, value and attention's output. Without recomputation also the feed-forward's
# activation, and its first product unless the activation is ReLU.
KEPT = {
    ("none", "relu"): (4, 8),  # the inputs and the outputs of both LayerNorms
    ("none", "gelu"): (4, 12),
    ("selective", "relu"): (2, 4),  # the inputs of both LayerNorms
    ("selective", "gelu"): (2, 4),
    ("full", "relu"): (1, 0),
    ("offload", "relu"): (1, 0),  # on the host, which is this device here
    ("none", "350m"): (4, 8),
    ("selective", "350m"): (3, 4),  # and the layer's input, which is the product's input without a LayerNorm before it
    ("full", "350m"): (1, 0),
}


def kept(mode: ActivationCheckpointing, changes: dict[str, Any], group: Group, sequence: bool) -> float:
    """What one layer more keeps between forward and backward, in multiples of its input's size."""
    held = []
    for layers in (1, 2):
        model = model_of(mode, {**changes, "vocab_size": 41, "num_hidden_layers": layers}, group, sequence=sequence)
        with Watch() as watch:
            loss = loss_of(model)
        for tensor in model.parameters():
            watch.alive.pop(tensor.untyped_storage()._cdata, None)
        held.append(sum(watch.alive.values()))
        assert loss.requires_grad
    return (held[1] - held[0]) / (ROWS * LENGTH * TINY["hidden_size"] * 4)


def kept_by_all(tensor: int, sequence: bool) -> dict[tuple[str, str], float]:
    from opt_parallel.parallel.topology import Topology

    with Topology.open(tensor) as topology:
        return {
            (mode, style): kept(ActivationCheckpointing(mode), STYLES[style], topology.tensor, sequence)
            for mode, style in KEPT
        }


@pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, False), pytest.param(2, False, marks=pytest.mark.long), (2, True)]
)
def test_what_a_layer_keeps(crew: Any, tensor: int, sequence: bool) -> None:
    """With sequence parallelism, each of t ranks keeps 1/t of everything. The tolerance is for the statistics of
    LayerNorms and attention, and for the seeds of dropout."""
    for found in crew(tensor)(kept_by_all, tensor, sequence):
        expected = {key: (a / tensor if sequence else a) + b / tensor for key, (a, b) in KEPT.items()}
        assert found == {key: pytest.approx(multiples, abs=0.15) for key, multiples in expected.items()}
