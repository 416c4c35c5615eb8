"""Schedule, parameter groups, gradient norm, loss scale."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from layouts import Layout, rate_at, run_for
from torch import Tensor, nn

from opt_parallel.config.optimizer import OptimizerConfig, OptimizerName, StateDtype
from opt_parallel.config.run import PrecisionConfig, Scaler, ScheduleConfig, ScheduleName
from opt_parallel.model.heads import CausalLM
from opt_parallel.optim import (
    OPTIMIZERS,
    LossScaler,
    RoundedAdamW,
    build_optimizer,
    kind_of,
    norm_of,
    sums_of_squares,
)
from opt_parallel.parallel.rounding import Piece
from opt_parallel.parallel.shard import Normal, Shard, fill, random_source
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


@pytest.mark.parametrize(("name", "dtype"), OPTIMIZERS, ids=lambda each: each.value)
def test_checkpoints_store_the_complete_state_of_an_optimizer(name: OptimizerName, dtype: StateDtype) -> None:
    """A state tensor that `moments` does not list would be lost at a resume."""
    kind = OPTIMIZERS[name, dtype]
    held = {StateDtype.fp32: torch.float32, StateDtype.bf16: torch.bfloat16}[dtype]
    flat = nn.Parameter(torch.randn(7, dtype=held))
    flat.grad_dtype = torch.float32
    flat.grad = torch.randn(7)
    optimizer = kind.build([{"params": [flat], "weight_decay": 0.1}], OptimizerConfig(name=name, state_dtype=dtype))
    optimizer.step()
    state = optimizer.state[flat]
    assert state.keys() == {"step", *kind.moments}
    for moment in kind.moments:
        assert state[moment].dtype is held, moment
        assert state[moment].shape == flat.shape, moment


BF16 = OptimizerConfig(lr=1e-2, betas=[0.8, 0.9], weight_decay=0.3, state_dtype=StateDtype.bf16)
FULL = Shard((4, 8, 10), 1, 0, 1, Normal(0.1), True)


def rounded_adamw(shard: Shard, cuts: list[int], values: dict[str, Tensor], steps: int = 3) -> dict[str, Tensor]:
    """The weights and moments after updates of this shard, which is cut into flat tensors with two elements of padding.
    `values` are the full weights, and the full gradient of each step."""
    local = {name: full[shard.range].reshape(-1) for name, full in values.items()}
    bounds = list(itertools.pairwise([0, *cuts, len(local["weights"])]))
    padded = {name: [nn.functional.pad(each[a:b], (0, 2)) for a, b in bounds] for name, each in local.items()}
    flats = [nn.Parameter(each.bfloat16()) for each in padded["weights"]]
    optimizer = RoundedAdamW([{"params": flats, "weight_decay": 0.3}], BF16)
    for flat, (a, b) in zip(flats, bounds, strict=True):
        flat.grad_dtype = torch.float32
        optimizer.pieces[flat] = [Piece(12345, shard, a, 0, b - a)]
    for step in range(steps):
        for flat, gradient in zip(flats, padded[f"gradient {step}"], strict=True):
            flat.grad = gradient
        optimizer.step()
    assert all(not flat[-2:].any() for flat in flats)
    kinds = {"weights": flats} | {kind: [optimizer.state[flat][kind] for flat in flats] for kind in MOMENTS}
    return {kind: torch.cat([each.detach()[:-2] for each in parts]) for kind, parts in kinds.items()}


MOMENTS = ("exp_avg", "exp_avg_sq")


def random_updates(steps: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["weights", *(f"gradient {step}" for step in range(steps))]
    return {name: torch.randn(FULL.shape, generator=generator).bfloat16().float() for name in names}


def test_rounded_adamw_rounds_torchs_update() -> None:
    """Weights and moments of one update are the bf16 values next to torch's fp32 values."""
    values = random_updates(1)
    found = rounded_adamw(FULL, [], values, 1)
    exact = nn.Parameter(values["weights"].reshape(-1).clone())
    exact.grad = values["gradient 0"].reshape(-1)
    optimizer = build_optimizer_of(exact)
    optimizer.step()
    for kind, wanted in {"weights": exact.detach(), **optimizer.state[exact]}.items():
        if kind != "step":
            assert found[kind].dtype is torch.bfloat16
            spacing = 2.0 ** (wanted.abs().log2().floor() - 7)
            assert ((found[kind].float() - wanted).abs() < spacing).all(), kind


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_rounded_adamw_gives_the_same_bits_in_every_layout(dim: int, count: int) -> None:
    values = random_updates()
    wanted = {kind: each.view(FULL.shape) for kind, each in rounded_adamw(FULL, [], values).items()}
    for index in range(count):
        shard = dataclasses.replace(FULL, dim=dim, index=index, count=count)
        for kind, part in rounded_adamw(shard, [17, 90], values).items():
            assert torch.equal(part.view(shard.local_shape), wanted[kind][shard.range]), kind


def test_small_updates_add_up() -> None:
    """Each update is a hundredth of the distance of two bf16 values. Rounded to the nearest value, it would be lost."""
    weights = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    config = dataclasses.replace(BF16, lr=2**-7 / 100, weight_decay=0.0)
    optimizer = RoundedAdamW([{"params": [weights]}], config)
    weights.grad_dtype = torch.float32
    optimizer.pieces[weights] = [Piece(1, Shard((4096,), 0, 0, 1, Normal(1), True), 0, 0, 4096)]
    for _ in range(50):
        weights.grad = torch.full((4096,), -1.0)
        optimizer.step()
    # The mean of 4,096 weights that each took 50 steps up with probability 1/100: deviation 0.7 / 64 of a step.
    assert (weights.double().mean().item() - 1) * 2**7 == pytest.approx(0.5, abs=0.06)


def build_optimizer_of(exact: nn.Parameter) -> torch.optim.Optimizer:
    config = dataclasses.replace(BF16, state_dtype=StateDtype.fp32)
    return kind_of(config).build([{"params": [exact], "weight_decay": 0.3}], config)


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
