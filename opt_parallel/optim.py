"""Optimizers by name, learning-rate schedule, gradient norm and clipping, loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opt_parallel.config.run import OptimizerConfig, OptimizerName, PrecisionConfig, Run, Scaler, ScheduleName
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.shard import marked, trained
from opt_parallel.parallel.topology import Group
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import Diverged


@dataclass(frozen=True)
class Optimizer:
    """How to build an optimizer, and its state tensors.

    `moments`: torch's names of the state tensors, each fp32 and as large as its parameter; checkpoints store them under
    these names. Under ZeRO 1–3 DeepSpeed updates flat one-dimensional partitions of the parameters, so an optimizer
    must be elementwise: one that needs full matrices (Adafactor, Muon) would have to gather them first. Its state of a
    parameter is `step`, which counts its updates, and the moments; resuming creates both before the first step.
    """

    build: Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one trained element in a checkpoint: its fp32 weight and moments."""
        return 4 * (1 + len(self.moments))


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), with torch's fused kernels."""
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


OPTIMIZERS = {OptimizerName.adamw: Optimizer(_adamw, ("exp_avg", "exp_avg_sq"))}


def saved_optimizer(config: dict[str, Any]) -> str:
    """The name of the optimizer in a checkpoint's configuration. Without `optimizer.name` it is AdamW."""
    return config.get("optimizer", {}).get("name", OptimizerName.adamw.value)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer of the trained parameters, in two groups: with weight decay (matrices) and without
    (biases, LayerNorms). An empty group is left out: DeepSpeed cannot flatten it."""
    decaying: list[Tensor] = []
    not_decaying: list[Tensor] = []
    for _, tensor, shard in trained(model):
        (decaying if shard.decay else not_decaying).append(tensor)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": not_decaying, "weight_decay": 0.0}]
    return OPTIMIZERS[config.name].build([group for group in groups if group["params"]], config)


def learning_rate(run: Run, clock: Clock) -> float:
    """The learning rate of the optimizer step that leads to `clock`; a pure function, so checkpoints hold no state of
    it.

    Linear warm-up that reaches the peak at its end, then linear (Zhang et al. 2022, section 2.2), cosine
    (Loshchilov & Hutter 2017) or constant; linear and cosine reach `final_ratio` of the peak at the run's last step.
    docs/resuming.md has the formula.
    """
    peak, ratio, warmup = run.optimizer.lr, run.schedule.final_ratio, warmup_steps(run, clock)
    if clock.step <= warmup:
        return peak * clock.step / warmup
    if run.schedule.name is ScheduleName.constant:
        return peak
    progress = min(1.0, (clock.step - warmup) / max(1, run.steps - warmup))
    if run.schedule.name is ScheduleName.linear:
        return peak * (1.0 - (1.0 - ratio) * progress)
    return peak * (ratio + (1.0 - ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def warmup_steps(run: Run, clock: Clock) -> float:
    """Steps of warm-up, given the run's average tokens per step until `clock`.

    So clock.step / warmup_steps = clock.tokens / warmup_tokens, and the learning rate does not jump where the batch
    changes. An integer if every step had today's number of tokens."""
    tokens = run.schedule.warmup_tokens
    if tokens is None or clock.tokens == clock.step * run.batch_tokens:
        return run.warmup_steps
    return tokens * clock.step / clock.tokens


def gradient_norm(model: nn.Module, group: Group) -> Tensor:
    """‖g‖₂ of the logical model, 0-d: shards are summed over the tensor group, replicated parameters count once."""
    split: list[Tensor] = []
    replicated: list[Tensor] = []
    for _, tensor, shard in marked(model):
        if tensor.grad is not None:
            (split if shard.count > 1 else replicated).append(tensor.grad)
    split_square = all_reduce(torch.nn.utils.get_total_norm(split) ** 2, group)
    return (split_square + torch.nn.utils.get_total_norm(replicated) ** 2).sqrt()


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale all gradients by min(1, limit / (norm + 1e-6)) (Pascanu et al. 2013; the 1e-6 is DeepSpeed's)."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for tensor in model.parameters():
        if tensor.grad is not None:
            tensor.grad *= factor


class LossScaler:
    """The fp16 loss scale, with the attributes that DeepSpeed's ZeRO optimizers use.

    The scale doubles after `window` steps without overflow and halves on overflow. The paper's scaler (metaseq) doubles
    and halves the window too, so that a large scale grows more slowly. DeepSpeed's own scaler has neither a moving
    window nor a floor below 1. The scale grows in `begin_step` only: DeepSpeed calls `update_scale` before it divides
    the gradients by the scale.

    As in metaseq, `scale` multiplies the sum of the tokens' losses: fp16 gradients of the mean would underflow in large
    batches. The engine's loss is a mean over `targets` tokens, so `cur_scale` is `scale` times `targets`.
    """

    dynamic = True

    def __init__(self, config: PrecisionConfig) -> None:
        self.scale, self.window, self.good_steps = config.initial_scale, config.window, 0
        self.floor, self.moving_window = config.floor, config.scaler is Scaler.paper
        self.targets = 1.0

    @property
    def cur_scale(self) -> float:
        """The factor that DeepSpeed multiplies the mean loss by, and divides gradients by."""
        return self.scale * self.targets

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.cur_scale

    def begin_step(self, targets: float) -> None:
        """Call before a step's first forward: grows the scale if due. `targets`: the step's number of targets, divided
        by the data degree."""
        self.targets = targets
        if self.good_steps >= self.window:
            self._rescale(2.0)

    def update_scale(self, overflow: bool) -> None:
        """Count a step; `overflow` is the same on all ranks.

        Raises: Diverged on an overflow at the floor: a smaller scale would only hide the divergence."""
        if not overflow:
            self.good_steps += 1
        elif self.scale <= self.floor:
            raise Diverged(
                f"gradients overflow fp16 at the lowest loss scale, precision.floor={self.floor}: the run diverges; "
                "resume from an earlier checkpoint with a lower optimizer.lr, or use precision=bf16"
            )
        else:
            self._rescale(0.5)

    def _rescale(self, factor: float) -> None:
        self.scale = max(self.scale * factor, self.floor)
        if self.moving_window:
            self.window = max(int(self.window * factor), 1)
        self.good_steps = 0

    def state(self) -> dict[str, Any]:
        """The state, for `load_state`."""
        window = self.window if self.moving_window else None
        return {"scale": self.scale, "good_steps": self.good_steps, "moved_window": window}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Load a saved `state`; floor, kind and a fixed window stay as configured."""
        self.scale, self.good_steps = max(saved["scale"], self.floor), saved["good_steps"]
        if self.moving_window and saved["moved_window"] is not None:
            self.window = saved["moved_window"]
