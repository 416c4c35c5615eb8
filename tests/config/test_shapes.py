"""The nine published shapes: parameters, also over the ranks of tensor 8, and FLOPs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from opt_parallel.config.compose import register_schema, run_from
from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import Run
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.shard import logical_parameters, marked
from opt_parallel.parallel.topology import ALONE, Group

CONFIGS = str(Path(__file__).parents[2] / "configs")
PARAMETERS = {
    "125m": 125_239_296, "350m": 331_196_416, "1.3b": 1_315_758_080, "2.7b": 2_651_596_800, "6.7b": 6_658_473_984,
    "13b": 12_853_473_280, "30b": 29_974_540_288, "66b": 65_719_701_504, "175b": 174_604_468_224,
}  # fmt: skip
# peak learning rate, tokens a step in units of 1024², steps to 300B tokens
RECIPE = {
    "125m": (6e-4, 0.5), "350m": (3e-4, 0.5), "1.3b": (2e-4, 1), "2.7b": (1.6e-4, 1), "6.7b": (1.2e-4, 2),
    "13b": (1e-4, 4), "30b": (1e-4, 4), "66b": (8e-5, 2), "175b": (1.2e-4, 2),
}  # fmt: skip


def composed(*overrides: str) -> Run:
    register_schema()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return run_from(compose("config", [*overrides, "run.name=test"]))


def published(size: str) -> ModelConfig:
    """The network of a file in configs/model, without Hydra. The recipes are composed, and compared with it."""
    return ModelConfig(**yaml.safe_load(Path(CONFIGS, "model", f"opt-{size}.yaml").read_text()))


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters(size: str) -> None:
    model = published(size)
    assert model.parameters() == PARAMETERS[size]
    with torch.device("meta"):
        whole = CausalLM(model, ALONE)
    assert logical_parameters(whole) == PARAMETERS[size]


# one with projections, and one without; the 12 heads of 125m do not split 8 ways
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, marks=() if size in ("350m", "1.3b") else pytest.mark.long)
        for size in PARAMETERS
        if size != "125m"
    ],
)
def test_parameters_over_eight_ranks(size: str) -> None:
    model = published(size)
    seen: dict[str, int] = {}
    for rank in range(8):
        with torch.device("meta"):
            part = CausalLM(model, Group(None, rank, 8))
        for name, tensor, shard in marked(part):
            if shard.count > 1 or rank == 0:  # whole ones count once
                assert tensor[shard.real].numel() == tensor.numel(), "nothing is padded at tensor 8"
                seen[name] = seen.get(name, 0) + tensor.numel()
    assert sum(seen.values()) == PARAMETERS[size]


@pytest.mark.parametrize("size", RECIPE)
def test_the_papers_recipe(size: str) -> None:
    run = composed(f"experiment=opt-{size}-paper")
    rate, batch = RECIPE[size]
    assert run.model == published(size)
    assert run.optimizer.lr == rate
    assert run.batch_tokens == batch * 1024**2
    assert run.steps * run.batch_tokens == pytest.approx(300e9, rel=1e-4)
    warmup = 2000 if size == "175b" else 375e6 / run.batch_tokens
    assert run.schedule.warmup_at(run.batch_tokens) == pytest.approx(warmup, abs=1)
    assert (run.optimizer.betas, run.optimizer.eps, run.optimizer.weight_decay) == ([0.9, 0.95], 1e-8, 0.1)
    assert (run.optimizer.clip, run.schedule.name.value, run.schedule.final_ratio) == (1.0, "linear", 0.1)
    assert (run.model.dropout, run.model.attention_dropout, run.model.init.value) == (0.1, 0.1, "paper")
    assert (run.precision.name.value, run.precision.scaler.value) == ("fp16", "paper")
    assert (run.precision.initial_scale, run.precision.window, run.precision.floor) == (4.0, 256, 2**-5)
    run.check_world(64)


def test_flops_of_a_token() -> None:
    model = published("1.3b")
    assert model.flops_per_token(2048) == pytest.approx(9.07e9, rel=1e-3)
    layers = 72 * 24 * 2048**2 * (1 + 2048 / (6 * 2048))  # Megatron's formula without the head
    first = last = 72 * 24 * 2048**2 / 9
    assert model.recomputed_flops_per_token(2048, whole=False) == pytest.approx(first)
    assert model.recomputed_flops_per_token(2048, whole=True) == pytest.approx(layers / 3 - last)


def test_flops_of_a_frozen_networks_token() -> None:
    """Each product's forward and its input's gradient; attention, which has no weights, costs what it always does."""
    model = ModelConfig(word_embed_proj_dim=512)
    assert model.flops_per_token(0, frozen=True) == pytest.approx(model.flops_per_token(0) * 2 / 3)
    by_attention = [model.flops_per_token(2048, frozen) - model.flops_per_token(0, frozen) for frozen in (False, True)]
    assert by_attention[0] == by_attention[1] > 0
