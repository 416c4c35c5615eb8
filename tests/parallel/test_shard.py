"""Marks, filling, and random initialisation that does not depend on the layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from opt_parallel.config.model import ModelConfig
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel import shard as shard_module
from opt_parallel.parallel.shard import Constant, Normal, Shard, fill, logical_parameters, marked, random_source
from opt_parallel.parallel.topology import ALONE, Group

CPU = torch.device("cpu")


def of(shape: tuple[int, ...], dim: int, index: int, count: int) -> Shard:
    return Shard(shape, dim, index, count, Normal(1.0, zero_row=1), True)


@pytest.mark.parametrize(("size", "count"), [(8, 2), (8, 3), (5, 4), (3, 4), (1, 1)])
def test_parts_tile_the_logical_tensor(size: int, count: int) -> None:
    parts = [of((2, size), 1, index, count) for index in range(count)]
    assert len({part.local_shape for part in parts}) == 1
    covered = [column for part in parts for column in range(part.range[1].start, part.range[1].stop)]
    assert covered == list(range(size))
    assert all(part.real[1].stop <= part.local_shape[1] for part in parts)


@pytest.mark.parametrize("shape", [(5000, 30), (30, 2500), (3, 1500, 1100), (7,)])
@pytest.mark.parametrize("count", [2, 3])
def test_random_values_do_not_depend_on_the_split(shape: tuple[int, ...], count: int) -> None:
    source = random_source(11)
    whole = source("weight", of(shape, 0, 0, 1))
    for dim, index in itertools.product(range(len(shape)), range(count)):
        part = of(shape, dim, index, count)
        assert torch.equal(source("weight", part), whole[part.range])


def test_random_values_are_normal_and_differ_by_name_seed_and_tile() -> None:
    whole = random_source(11)("a", of((2048, 2048), 0, 0, 1))
    assert whole[1].count_nonzero() == 0
    assert float(whole.mean()) == pytest.approx(0.0, abs=3e-3)
    assert float(whole.std()) == pytest.approx(1.0, abs=3e-3)
    tiles = [whole[:1024, :1024], whole[:1024, 1024:], whole[1024:, :1024], whole[1024:, 1024:]]
    others = [random_source(11)("b", of((1024, 1024), 0, 0, 1)), random_source(12)("a", of((1024, 1024), 0, 0, 1))]
    for one, two in itertools.combinations([*tiles, *others], 2):
        correlation = float((one[2:] * two[2:]).mean())
        assert abs(correlation) < 5e-3


def test_no_more_than_the_range_is_ever_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = torch.empty

    def spy(*shape: object, **named: object) -> torch.Tensor:
        tensor = real(*shape, **named)
        drawn.append(tensor.numel())
        return tensor

    monkeypatch.setattr(shard_module.torch, "empty", spy)
    random_source(1)("weight", of((64, 100_000), 1, 3, 50))
    assert max(drawn) <= max(64 * 2000, shard_module.TILE**2)


def test_fill_keeps_marks_ties_and_values() -> None:
    config = ModelConfig(vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32)
    with torch.device("meta"):
        model = CausalLM(config, Group(None, 1, 2))
    settled: list[nn.Module] = []
    fill(model, random_source(1), CPU, torch.float32, settled.append)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    assert logical_parameters(model) == config.parameters()
    assert all(tensor.device == CPU for tensor in model.parameters())
    embedding = model.decoder.embed_tokens.weight
    assert embedding.shape == (34, 16)
    assert embedding[33].count_nonzero() == 0  # the padded row
    assert model.decoder.embed_tokens in settled
    assert model.decoder not in settled  # has no parameter of its own


def test_the_papers_and_hugging_faces_initialisation() -> None:
    from opt_parallel.config.model import Init

    for init, std, residual in ((Init.paper, 0.006, 0.006 / 2), (Init.huggingface, 0.02, 0.02)):
        with torch.device("meta"):
            model = CausalLM(ModelConfig(vocab_size=4000, num_hidden_layers=2, init=init), ALONE)
        initial = {name: shard.initial for name, _, shard in marked(model)}
        for name, value in initial.items():
            if name.endswith("bias"):
                assert value == Constant(0.0)
            elif "layer_norm" in name:
                assert value == Constant(1.0)
            else:
                assert isinstance(value, Normal)
                expected = residual if "out_proj" in name or "fc2" in name else std
                assert value.std == pytest.approx(expected)
        assert initial["decoder.embed_tokens.weight"] == Normal(std, zero_row=1)
