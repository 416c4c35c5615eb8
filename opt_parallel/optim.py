"""The optimizers by name, the learning rate's schedule, the gradient norm, the loss scale."""

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
    """An optimizer, and its state beside the fp32 weights.

    `moments`: torch's names of the state tensors, each fp32 and as large as its parameter; checkpoints store them under
    these names. Under ZeRO 1–3 DeepSpeed steps flat one-dimensional partitions of the parameters, so an optimizer must
    work element by element: one that looks at whole matrices (Adafactor, Muon) needs them gathered first.
    """

    build: Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a trained parameter in a checkpoint: its weight and its moments."""
        return 4 * (1 + len(self.moments))


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019, with torch's fused kernels."""
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


OPTIMIZERS = {OptimizerName.adamw: Optimizer(_adamw, ("exp_avg", "exp_avg_sq"))}


def saved_moments(config: dict[str, Any]) -> tuple[str, ...]:
    """The moments of the optimizer that a manifest's configuration names; before it had a name it was AdamW."""
    return OPTIMIZERS[OptimizerName(config.get("optimizer", {}).get("name", "adamw"))].moments


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer of what is trained, with a group that decays (matrices) and one that does not (biases,
    LayerNorms). A group of nothing is left out: DeepSpeed would make a flat tensor of it."""
    decaying: list[Tensor] = []
    steady: list[Tensor] = []
    for _, tensor, shard in trained(model):
        (decaying if shard.decay else steady).append(tensor)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": steady, "weight_decay": 0.0}]
    return OPTIMIZERS[config.name].build([group for group in groups if group["params"]], config)


def learning_rate(run: Run, clock: Clock) -> float:
    """The learning rate of the optimizer step that leads to `clock`: a pure function, so a resume needs no state.

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
    """How many steps the warm-up takes, at the tokens that the run's steps had on average until `clock`.

    So `clock.step` of them are the share clock.tokens / warmup_tokens, and no change of the batch makes either the
    warm-up or what follows it jump. Where every step had the tokens of today's batch, these are whole steps."""
    tokens = run.schedule.warmup_tokens
    if tokens is None or clock.tokens == clock.step * run.batch_tokens:
        return run.warmup_steps
    return tokens * clock.step / clock.tokens


def gradient_norm(model: nn.Module, group: Group) -> Tensor:
    """‖g‖₂ of the unsplit model, 0-d: split parameters add up over the tensor group, whole ones count once."""
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for _, tensor, shard in marked(model):
        if tensor.grad is not None:
            (split if shard.count > 1 else whole).append(tensor.grad)
    split_square = all_reduce(torch.nn.utils.get_total_norm(split) ** 2, group)
    return (split_square + torch.nn.utils.get_total_norm(whole) ** 2).sqrt()


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm if that is below 1 (Pascanu et al. 2013); 1e-6 as DeepSpeed adds it."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for tensor in model.parameters():
        if tensor.grad is not None:
            tensor.grad *= factor


class LossScaler:
    """The fp16 loss scale, with the attributes that DeepSpeed's ZeRO optimizers ask of theirs.

    It doubles after `window` steps without overflow and halves on one. The paper's scaler (its launcher, metaseq)
    doubles and halves the window too, so that a large scale is raised ever more cautiously. DeepSpeed's own can do
    neither that nor a floor below 1. Growth waits for the next step to begin: DeepSpeed takes note of a step before it
    divides its gradients by the scale that they were made with.

    As in metaseq, `scale` multiplies the sum of the tokens' losses: fp16 gradients of their mean would underflow, the
    more the larger the batch. The loss that arrives is a mean already, over `targets` tokens, so it is multiplied by
    their number first.
    """

    dynamic = True

    def __init__(self, config: PrecisionConfig) -> None:
        self.scale, self.window, self.good_steps = config.initial_scale, config.window, 0
        self.floor, self.moving_window = config.floor, config.scaler is Scaler.paper
        self.targets = 1.0

    @property
    def cur_scale(self) -> float:
        """What DeepSpeed multiplies the mean loss by, and divides gradients by."""
        return self.scale * self.targets

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.cur_scale

    def begin_step(self, targets: float) -> None:
        """Before a step's first forward: grow if it is time. The loss that will arrive is a sum over `targets`."""
        self.targets = targets
        if self.good_steps >= self.window:
            self._rescale(2.0)

    def update_scale(self, overflow: bool) -> None:
        """Take note of one step, `overflow` agreed by all ranks.

        Raises: Diverged on an overflow at the floor: a smaller scale would only hide a run that diverges."""
        if not overflow:
            self.good_steps += 1
        elif self.scale <= self.floor:
            raise Diverged(
                f"gradients overflow fp16 at the lowest loss scale, precision.floor={self.floor}: the run diverges; "
                "go on from an earlier checkpoint with a lower optimizer.lr, or use precision=bf16"
            )
        else:
            self._rescale(0.5)

    def _rescale(self, factor: float) -> None:
        self.scale = max(self.scale * factor, self.floor)
        if self.moving_window:
            self.window = max(int(self.window * factor), 1)
        self.good_steps = 0

    def state(self) -> dict[str, Any]:
        """Where it stands, for `continue_from`."""
        window = self.window if self.moving_window else None
        return {"scale": self.scale, "good_steps": self.good_steps, "moved_window": window}

    def continue_from(self, saved: dict[str, Any]) -> None:
        """Take over where another scaler stood; floor, kind and a fixed window stay as configured."""
        self.scale, self.good_steps = max(saved["scale"], self.floor), saved["good_steps"]
        if self.moving_window and saved["moved_window"] is not None:
            self.window = saved["moved_window"]
