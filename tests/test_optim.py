"""Schedule, parameter groups, gradient norm, loss scale."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from layouts import Layout, rate_at, run_for

from opt_parallel.config.run import (
    OptimizerConfig,
    OptimizerName,
    PrecisionConfig,
    Scaler,
    ScheduleConfig,
    ScheduleName,
)
from opt_parallel.model.heads import CausalLM
from opt_parallel.optim import OPTIMIZERS, LossScaler, build_optimizer, norm_of, sums_of_squares
from opt_parallel.parallel.shard import fill, random_source
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError


def rates(name: str, steps: int = 10, warmup: int = 4) -> list[float]:
    schedule = ScheduleConfig(name=ScheduleName(name), warmup_steps=warmup, final_ratio=0.1)
    run = dataclasses.replace(run_for(Layout(), lr=1.0), steps=steps, schedule=schedule)
    return [rate_at(run, Clock(step + 1)) for step in range(steps)]


def test_schedules() -> None:
    warmup = [0.25, 0.5, 0.75, 1.0]
    assert rates("linear") == pytest.approx([*warmup, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1])
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 6)) for i in range(1, 7)]
    assert rates("cosine") == pytest.approx([*warmup, *cosine])
    assert rates("constant") == pytest.approx([*warmup, *[1.0] * 6])
    assert rates("linear", steps=4, warmup=4) == pytest.approx(warmup)
    assert rates("linear", steps=1, warmup=0) == pytest.approx([0.1])


def small_model() -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(run_for(Layout()).model, ALONE)
    fill(model, random_source(1), torch.device("cpu"), torch.float32)
    return model


def test_biases_and_layer_norms_do_not_decay() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, betas=[0.8, 0.9]))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in model.named_parameters():
        steady = name.endswith("bias") or "layer_norm" in name
        assert decays.pop(id(tensor)) == (0.0 if steady else 0.3), name
    assert not decays
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS, ids=lambda name: name.value)
def test_checkpoints_store_the_complete_state_of_an_optimizer(name: OptimizerName) -> None:
    """A state tensor that `moments` does not list would be lost at a resume."""
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    for tensor in model.parameters():
        tensor.grad = torch.randn_like(tensor)
    optimizer.step()
    for key, tensor in model.named_parameters():
        state = optimizer.state[tensor]
        assert state.keys() == {"step", *OPTIMIZERS[name].moments}, key
        for moment in OPTIMIZERS[name].moments:
            assert state[moment].dtype is torch.float32, (key, moment)
            assert state[moment].shape == tensor.shape, (key, moment)


def test_the_norm_is_torchs() -> None:
    model = small_model()
    for tensor in model.parameters():
        tensor.grad = torch.randn_like(tensor)
    squares = sums_of_squares(((tensor, tensor.grad) for tensor in model.parameters()), torch.device("cpu"))
    expected = torch.nn.utils.get_total_norm([tensor.grad for tensor in model.parameters()])
    assert norm_of(squares, ALONE).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_papers_scaler_widens_its_window() -> None:
    scaler = LossScaler(PrecisionConfig(initial_scale=4.0, window=2, floor=1.0))
    history = []
    for overflow in [False] * 2 + [False] * 4 + [True] + [False] * 4:
        scaler.update_scale(overflow)
        scaler.begin_step()
        history.append((scaler.scale, scaler.window))
    assert history == [(4, 2), (8, 4), (8, 4), (8, 4), (8, 4), (16, 8), (8, 4), (8, 4), (8, 4), (8, 4), (16, 8)]


def test_the_standard_scaler_keeps_its_window() -> None:
    scaler = LossScaler(PrecisionConfig(scaler=Scaler.standard, initial_scale=4.0, window=2, floor=1.0))
    for _ in range(6):
        scaler.update_scale(False)
        scaler.begin_step()
    assert (scaler.scale, scaler.window) == (32.0, 2)


def test_an_overflow_at_the_floor_ends_the_run_with_advice() -> None:
    scaler = LossScaler(PrecisionConfig(initial_scale=2.0, floor=1.0))
    scaler.update_scale(True)
    assert scaler.scale == 1.0
    with pytest.raises(UserError, match=r"precision\.floor=1\.0.*optimizer\.lr"):
        scaler.update_scale(True)


def test_a_resumed_scaler_keeps_what_is_configured_now() -> None:
    saved = LossScaler(PrecisionConfig(initial_scale=4.0, window=2))
    for _ in range(3):
        saved.update_scale(False)
        saved.begin_step()
    now = LossScaler(PrecisionConfig(initial_scale=64.0, floor=0.5))
    now.load_state(saved.state())
    assert (now.scale, now.window, now.good_steps, now.floor) == (8.0, 4, 1, 0.5)
    fixed = LossScaler(PrecisionConfig(scaler=Scaler.standard, window=10))
    fixed.load_state(saved.state())
    assert (fixed.scale, fixed.window) == (8.0, 10)
