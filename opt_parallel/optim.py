"""Optimizers, the learning-rate schedule, gradient norm and clipping, and the loss scale."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opt_parallel.config.optimizer import OptimizerConfig, OptimizerName, StateDtype
from opt_parallel.config.run import PrecisionConfig, Scaler, ScheduleConfig, ScheduleName
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.rounding import Piece, addresses, keys, rounded
from opt_parallel.parallel.shard import shard_of, trained
from opt_parallel.parallel.topology import Group
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import Diverged
from opt_parallel.zero import keep_copy, share_weights

CHUNK = 2**22  # elements that `RoundedAdamW` updates at a time, which bounds the memory of its fp32 values


@dataclass(frozen=True)
class OptimizerKind:
    """The functions that build a torch optimizer and give it weights, and the names of the optimizer's state tensors.

    `moments` are the names of the state tensors, torch's names if torch has the optimizer. Checkpoints store the
    moments under these names, which do not depend on the dtype of the state. `prepare` determines which weights the
    optimizer updates after DeepSpeed has flattened them: `zero.keep_copy` or `zero.share_weights`. The optimizer must
    meet these requirements:

    * The state of a parameter consists of the moments, each with the shape of the parameter and the dtype
      `optimizer.state_dtype`, and of `step`, the number of updates of the parameter.
    * `step()` accepts a state that it did not create. In a resumed run, `zero.reset_moments` creates `step` (0-d
      float32) and moments of zeros before the first step, and the checkpoint's values are then copied into the moments.
    * The optimizer is elementwise, because under ZeRO 1–3 DeepSpeed updates flat one-dimensional partitions of the
      parameters. An optimizer that needs full matrices (Adafactor, Muon) would have to gather them first.
    * Counters belong to the state of a parameter, not to the optimizer or its groups. Under ZeRO-3, DeepSpeed calls
      `step()` once for each flat partition, with this partition as the only parameter and the other groups empty.
    * A weight that is zero stays zero if its gradients are zero, because such weights pad split tensors and partitions.
    * Each step reads the learning rate from `group["lr"]`, which the engine sets.
    * A parameter without a gradient is skipped, as by torch's optimizers.
    """

    build: Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]
    prepare: Callable[[Any, int, int, int], None]

    @property
    def checkpoint_bytes(self) -> int:
        """Number of bytes in a checkpoint for each trained element, which has a weight and moments, all fp32."""
        return 4 * (1 + len(self.moments))


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with torch's fused kernels."""
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW with bf16 weights and moments and fp32 gradients. An update is computed in fp32, and then rounded
    stochastically to bf16.

    `pieces` has the parameters of each flat tensor. `zero.share_weights` sets it, since ZeRO flattens parameters."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        first, second = config.betas
        defaults = {"lr": config.lr, "betas": (first, second), "eps": config.eps, "weight_decay": config.weight_decay}
        super().__init__(groups, defaults)
        self.pieces: dict[Tensor, list[Piece]] = defaultdict(list)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._update(weights, weights.grad, group)

    def _update(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weights]
        if not state:
            state["step"] = torch.zeros((), device=weights.device)
            state |= {"exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.zeros_like(weights)}
        state["step"] += 1
        rounding, exact = keys(state["step"], 3), state["step"].double()
        corrections = [(1 - beta**exact).float() for beta in group["betas"]]
        for begin in range(0, len(weights), CHUNK):
            end = min(begin + CHUNK, len(weights))
            # `data` has no gradient. torch.compile does not accept a bf16 tensor with an fp32 gradient.
            tensors = [each[begin:end] for each in (weights.data, state["exp_avg"], state["exp_avg_sq"])]
            values = torch.stack([each.float() for each in tensors])
            _adamw_update(values, gradient[begin:end], corrections, group)
            numbers = addresses(self.pieces[weights], begin, end, weights.device)
            for tensor, result in zip(tensors, rounded(values, numbers, rounding), strict=True):
                tensor.copy_(result)


def _adamw_update(values: Tensor, gradient: Tensor, corrections: list[Tensor], group: dict[str, Any]) -> None:
    """Update `values` (3, n), the weights and their two moments, in fp32. `corrections` are 1 - beta^step."""
    weights, first, second = values
    (first_beta, second_beta), rate = group["betas"], group["lr"]
    first.lerp_(gradient, 1 - first_beta)
    second.mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
    size = (second / corrections[1]).sqrt_().add_(group["eps"]).mul_(corrections[0])
    weights.mul_(1 - rate * group["weight_decay"]).addcdiv_(first, size, value=-rate)


OPTIMIZERS = {
    (OptimizerName.adamw, StateDtype.fp32): OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq"), keep_copy),
    (OptimizerName.adamw, StateDtype.bf16): OptimizerKind(RoundedAdamW, ("exp_avg", "exp_avg_sq"), share_weights),
}


def kind_of(config: OptimizerConfig) -> OptimizerKind:
    """The kind of the configured optimizer."""
    return OPTIMIZERS[config.name, config.state_dtype]


def saved_optimizer(config: dict[str, Any]) -> str:
    """The name of the optimizer in a checkpoint. A configuration without `optimizer.name` means AdamW."""
    return config.get("optimizer", {}).get("name", OptimizerName.adamw.value)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer for the trained parameters. Matrices form a parameter group with weight decay, and
    biases and LayerNorms a group without weight decay. An empty group is left out, because DeepSpeed cannot flatten an
    empty group."""
    decaying: list[Tensor] = []
    not_decaying: list[Tensor] = []
    for _, tensor, shard in trained(model):
        (decaying if shard.decay else not_decaying).append(tensor)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": not_decaying, "weight_decay": 0.0}]
    return kind_of(config).build([group for group in groups if group["params"]], config)


def learning_rate(peak: float, schedule: ScheduleConfig, steps: int, batch_tokens: int, clock: Clock) -> float:
    """The learning rate of the optimizer step that ends at the position `clock`. The learning rate is a pure function
    of the position, so checkpoints hold no state of the schedule.

    After a linear warm-up to the peak, the learning rate decays linearly (Zhang et al. 2022, section 2.2), decays as a
    cosine (Loshchilov & Hutter 2017), or is constant. The linear and cosine schedules reach `final_ratio` of the peak
    at the run's last step. docs/resuming.md has the formulas.

    Args:
        peak: the learning rate at the end of the warm-up, `optimizer.lr`.
        steps: the number of steps of the run.
        batch_tokens: the number of tokens in a step of the present batch.
    """
    ratio, warmup = schedule.final_ratio, warmup_steps(schedule, batch_tokens, clock)
    if clock.step <= warmup:
        return peak * clock.step / warmup
    if schedule.name is ScheduleName.constant:
        return peak
    progress = min(1.0, (clock.step - warmup) / max(1, steps - warmup))
    if schedule.name is ScheduleName.linear:
        return peak * (1.0 - (1.0 - ratio) * progress)
    return peak * (ratio + (1.0 - ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def warmup_steps(schedule: ScheduleConfig, batch_tokens: int, clock: Clock) -> float:
    """Number of warm-up steps, computed from `warmup_tokens` with the run's average number of tokens per step until
    `clock`.

    The ratio clock.step / warmup_steps then equals clock.tokens / warmup_tokens, so the learning rate does not jump if
    the batch size changes. The number of warm-up steps is an integer if every step had the number of tokens of the
    present batch."""
    tokens = schedule.warmup_tokens
    if tokens is None or clock.tokens == clock.step * batch_tokens:
        return schedule.warmup_at(batch_tokens)
    return tokens * clock.step / clock.tokens


def sums_of_squares(gradients: Iterable[tuple[nn.Parameter, Tensor]], device: torch.device) -> Tensor:
    """The sums of squares of the gradients of split and of replicated parameters, fp32 (2,) on `device`.

    Args:
        gradients: pairs of a parameter, whose mark is read, and a part of its fp32 gradient."""
    parts = {True: [torch.zeros(1, device=device)], False: [torch.zeros(1, device=device)]}
    for parameter, part in gradients:
        parts[shard_of(parameter).count > 1].append(part)
    return torch.stack([torch.stack(torch._foreach_norm(parts[split])).square().sum() for split in (True, False)])


def norm_of(squares: Tensor, group: Group) -> Tensor:
    """The norm ‖g‖₂ of the gradient of the full (unsplit) model, a 0-d tensor, from the sums of squares (2,) that
    belong to a tensor rank. The squares of split parameters are summed over the tensor group, and replicated parameters
    count once."""
    return (all_reduce(squares[0], group) + squares[1]).sqrt()


class LossScaler:
    """The loss scale for fp16.

    The scale doubles after `window` steps without overflow and halves on overflow. The paper's scaler (metaseq) doubles
    and halves the window too, so that a large scale grows more slowly. DeepSpeed's own scaler has neither a changing
    window nor a minimum scale below 1. The scale grows in `begin_step` only, because until then `scale` is the scale of
    the step that ended.

    As in metaseq, `scale` multiplies the sum of the tokens' losses, because fp16 gradients of the mean would underflow
    in large batches.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        self.scale, self.window, self.good_steps = config.initial_scale, config.window, 0
        self.floor, self.moving_window = config.floor, config.scaler is Scaler.paper

    def begin_step(self) -> None:
        """Double the scale after enough steps without overflow. Call this method before a step's first forward."""
        if self.good_steps >= self.window:
            self._rescale(2.0)

    def update_scale(self, overflow: bool) -> None:
        """Count a step without overflow, or halve the scale on an overflow. `overflow` must be equal on all ranks.

        Raises: Diverged on an overflow at the minimum scale, since a smaller scale would only hide the divergence."""
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
        """The scaler's state as JSON values, for `load_state`."""
        window = self.window if self.moving_window else None
        return {"scale": self.scale, "good_steps": self.good_steps, "moved_window": window}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Load a saved `state`. The minimum scale, the kind of scaler and a fixed window stay as configured."""
        self.scale, self.good_steps = max(saved["scale"], self.floor), saved["good_steps"]
        if self.moving_window and saved["moved_window"] is not None:
            self.window = saved["moved_window"]
