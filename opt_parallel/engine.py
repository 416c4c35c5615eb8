"""The optimizer steps of a run, computed with DeepSpeed ZeRO. Only this module imports DeepSpeed."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups, numa
from torch import Tensor, nn

from opt_parallel.config.model import Labels
from opt_parallel.config.optimizer import StateDtype
from opt_parallel.config.run import Offload, Precision, Run
from opt_parallel.data.samples.batches import Totals
from opt_parallel.data.samples.samples import Batch
from opt_parallel.gradients import PartitionedGradients, ShardedGradients, WholeGradients
from opt_parallel.model.build import network
from opt_parallel.optim import LossScaler, build_optimizer, kind_of, learning_rate, norm_of
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import Source, fill, trained
from opt_parallel.parallel.topology import DTYPES, Topology
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import Diverged, UserError
from opt_parallel.zero import (
    Fragment,
    Replica,
    flat_weights,
    held_fragments,
    owned_fragments,
    refresh_working_weights,
    replicas,
    reset_moments,
    updates_made,
)

# DeepSpeed would compile a test program for each of its operators, and a CPU collective that only its inference uses.
# An empty table of available operators prevents both, so no compiler is needed.
deepspeed.ops.__compatible_ops__ = {}
# On CPUs, DeepSpeed starts `numactl` for every block whose gradients ZeRO-3 reduces. The answer does not change.
numa.get_numa_cores = functools.cache(numa.get_numa_cores)


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    `loss` is the mean over the targets of the global batch. `tokens` is the number of tokens in the global batch
    without padding. `grad_norm` is the norm before clipping. `skipped` is true if fp16 gradients overflowed, so that
    the weights did not change.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    loss_scale: float | None
    skipped: bool


class Engine:
    """A model wrapped by DeepSpeed ZeRO, with optimizer steps, evaluation, and views of the training state."""

    def __init__(self, run: Run, topology: Topology, wrapped: Any) -> None:
        self.run, self.topology = run, topology
        self.wrapped = wrapped  # deepspeed.DeepSpeedEngine.
        kind = kind_of(run.optimizer)
        kind.prepare(wrapped, run.zero.stage, topology.data.rank, run.seed)
        self.moments = kind.moments
        self.scaler = LossScaler(run.precision) if run.precision.name is Precision.fp16 else None
        self.gradients = _gradients(run, topology, wrapped)

    @classmethod
    def build(cls, run: Run, topology: Topology, source: Source, labels: Labels | None = None) -> Engine:
        """The run's model with weights from `source`, wrapped by DeepSpeed. `labels` are the labels of a classifier."""
        model = network(
            run.model, run.task.lora, labels, topology.tensor, run.activation_checkpointing, run.parallel.sequence
        )
        settings = deepspeed_settings(run, topology)
        # Without this line, DeepSpeed refuses fp16 on CPUs without fp16 instructions, although torch emulates fp16
        # there.
        get_accelerator().is_fp16_supported = lambda: True

        def partition(module: nn.Module) -> None:
            deepspeed.zero.Init(
                module=module,
                data_parallel_group=topology.data.handle,
                config_dict_or_path=settings,
                mpu=topology,
                dtype=DTYPES[run.precision.name],
            )

        on_filled = partition if run.zero.stage == 3 else lambda module: None
        fill(model, source, topology.device, DTYPES[run.precision.name], on_filled)
        with contextlib.redirect_stdout(io.StringIO()):  # hide the memory use that DeepSpeed prints on every rank
            wrapped, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, run.optimizer),
                config=settings,
                mpu=topology,
                dist_init_required=False,
            )
        return cls(run, topology, wrapped)

    def step(self, batches: list[Batch], clock: Clock, totals: Totals | None = None) -> StepResult:
        """Take one optimizer step at the run's position `clock`, on the micro-batches of this data rank.

        The loss is the mean over all N targets of the global batch. N is known before the first forward: the training
        loop passes `totals`, which it exchanged during the previous step, and otherwise N is summed here. The loss of
        a micro-batch is its sum / N. In fp16, the sum is multiplied by the loss scale instead, and the gradients are
        divided by both. Where DeepSpeed averages the gradients over the data ranks, the loss is multiplied by
        `data.size`.

        Raises: UserError if the global batch has no targets; Diverged if the gradients are not finite.
        """
        data, step = self.topology.data, clock.step
        targets, tokens = totals or self._totals(batches)
        if targets == 0:
            raise UserError(f"step {step + 1}: the {self.run.global_batch} samples of the global batch have no labels")
        run, after = self.run, clock.after(self.run.global_batch, tokens)
        lr = learning_rate(run.optimizer.lr, run.schedule, run.steps, run.batch_tokens, after)
        for group in self.wrapped.optimizer.param_groups:
            group["lr"] = lr
        averaged = data.size if self.gradients.averaged else 1
        weight, unscale, loss_scale = averaged / targets, 1.0, None
        if self.scaler is not None:
            self.scaler.begin_step()
            weight = loss_scale = self.scaler.scale
            unscale = averaged / (targets * loss_scale)
        total = torch.zeros((), device=self.topology.device)
        self.wrapped.train()
        for micro, batch in enumerate(batches):
            loss = self._loss(batch.to(self.topology.device), step, micro)
            total += loss.detach()
            self.gradients.backward(loss * weight, first=micro == 0, last=micro == len(batches) - 1)
        summed, norm = self._loss_and_norm(total)
        skipped = self._update(step, norm * unscale, unscale)
        # A recomputation ends inside a layer, so DeepSpeed would keep the layer on this list for the rest of the run.
        del FWD_MODULE_STACK[1:]
        return StepResult(summed / targets, norm * unscale, lr, tokens, loss_scale, skipped)

    def _totals(self, batches: list[Batch]) -> Totals:
        data, topology = self.topology.data, self.topology
        return Totals(
            topology.sum(sum(batch.targets for batch in batches), data),
            topology.sum(sum(batch.tokens for batch in batches), data),
        )

    def _loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        draw = Draw(self.run.seed, step, micro, self.topology.data.rank, batch.samples)
        loss = self.gradients.module(batch.ids, batch.labels, batch.positions, batch.segments, draw)
        assert isinstance(loss, Tensor)
        return loss

    def _loss_and_norm(self, total: Tensor) -> tuple[float, float]:
        """The sum of the losses over the data ranks, and the gradient norm. This is the only place of a step where the
        host waits for the device: all gradients are computed and summed before the weights are updated."""
        device = flat_weights(self.wrapped, self.run.zero.stage)[0].device
        total = total.to(device)  # With offload, this waits until the gradients are in the host's memory.
        sums = all_reduce(torch.cat([self.gradients.squares(), total[None]]), self.topology.data)
        loss, norm = torch.stack([sums[2], norm_of(sums[:2], self.topology.tensor)]).tolist()
        return loss, norm

    def _update(self, step: int, norm: float, unscale: float) -> bool:
        """Update the weights with clipped gradients, or return True if fp16 gradients overflowed.

        The gradients are multiplied by min(1, clip / (norm + 1e-6)) (Pascanu et al. 2013; the 1e-6 is torch's)."""
        finite, clip = math.isfinite(norm), self.run.optimizer.clip
        if self.scaler is not None:
            self.scaler.update_scale(overflow=not finite)
        elif not finite:
            raise Diverged(
                f"step {step + 1}: the gradients are not finite, so the weights were not updated: resume from the last "
                "checkpoint with a lower optimizer.lr or another seed"
            )
        factor = unscale * min(1.0, clip / (norm + 1e-6)) if clip > 0 else unscale
        self.gradients.update(factor if finite else None)
        return not finite

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of the losses of this data rank's batch, computed without dropout."""
        return self._forward(batch, batch.labels)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """The classifier's scores (B, N) for this data rank's batch, computed without dropout."""
        return self._forward(batch, None)

    def _forward(self, batch: Batch, labels: Tensor | None) -> Tensor:
        self.wrapped.eval()
        batch, device = batch.to(self.topology.device), self.topology.device
        output = self.wrapped(
            batch.ids, labels if labels is None else labels.to(device), batch.positions, batch.segments
        )
        assert isinstance(output, Tensor)
        return output

    def owned(self) -> Iterator[Fragment]:
        """The fragments of the training state that this rank saves, as live views. Each element of the training state
        is saved by exactly one rank."""
        return owned_fragments(self.wrapped, self.run.zero.stage, self.topology, self.moments)

    def replicas(self) -> Iterator[Replica]:
        """Live views of the values of which other ranks hold copies with equal bits."""
        return replicas(self.wrapped, self.run.zero.stage, self.topology, self.moments)

    def tensors(self) -> dict[str, dict[str, Any]]:
        """The full (unsplit) shape of each trained parameter, the dimension along which it is split, and the number of
        parts."""
        model = self.wrapped.module
        return {name: {"shape": list(s.shape), "dim": s.dim, "parts": s.count} for name, _, s in trained(model)}

    @property
    def updates(self) -> int:
        """The number of weight updates so far. Steps that fp16 skipped are not counted."""
        return updates_made(self.wrapped, self.run.zero.stage)

    def restore(
        self, read: Callable[[Iterable[Fragment]], None], updates: int, loss_scale: dict[str, Any] | None
    ) -> None:
        """Load a saved training state. `read` fills the fragments of this rank's weights and moments in place."""
        stage = self.run.zero.stage
        reset_moments(self.wrapped, stage, self.moments, updates)
        read(held_fragments(self.wrapped, stage, self.topology.data.rank, self.moments))
        refresh_working_weights(self.wrapped, stage)
        if self.scaler is not None and loss_scale is not None:
            self.scaler.load_state(loss_scale)

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks, so that this process can build another engine."""
        self.wrapped.destroy()
        _forget_run()


def _forget_run() -> None:
    """Remove the topology and ZeRO-3's model from where DeepSpeed keeps them until the process ends: two global
    variables, and the cache of a decorated method. Both keep process groups, whose threads wake up a hundred times in a
    second."""
    groups.mpu = None
    FWD_MODULE_STACK.clear()
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    cached.__closure__[0].cell_contents.cache_clear()


def _gradients(run: Run, topology: Topology, wrapped: Any) -> WholeGradients | PartitionedGradients | ShardedGradients:
    """The gradients of a step under the run's ZeRO stage."""
    if run.zero.stage == 0:
        return WholeGradients(wrapped, topology.data)
    if run.zero.stage == 3:
        return ShardedGradients(wrapped)
    return PartitionedGradients(wrapped.module, wrapped.optimizer, topology.data, run.zero.reduce_bucket_size)


def deepspeed_settings(run: Run, topology: Topology) -> dict[str, Any]:
    """The configuration dictionary that DeepSpeed needs for the run."""
    zero, layer = run.zero, run.model.layer_parameters // topology.tensor.size
    on_gpu = topology.device.type == "cuda"
    bf16_state = run.optimizer.state_dtype is StateDtype.bf16
    sections: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": run.global_batch // (run.micro_batch * topology.data.size),
        "gradient_clipping": 0.0,  # Engine clips
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # this timer waits for the device twice in each micro-batch
        "bf16": {
            "enabled": run.precision.name is Precision.bf16,
            "bf16_master_weights_and_grads": bf16_state,
            "bf16_optimizer_states": bf16_state,
        },
        "fp16": {"enabled": run.precision.name is Precision.fp16, "loss_scale": 1.0},  # Engine scales
        "zero_optimization": {
            "stage": 2 if zero.stage == 1 else zero.stage,  # PartitionedGradients replaces the reduction of both
            "reduce_bucket_size": zero.reduce_bucket_size,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            "offload_optimizer": {"device": zero.offload.value, "pin_memory": on_gpu},
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            # At most two layers' weights are gathered. Weights that are used again within the next two layers stay
            # gathered: those of a recomputed layer until its backward. Prefetching stops at one and a half layers.
            "stage3_max_reuse_distance": 2 * layer,
            "stage3_max_live_parameters": 3 * layer // 2,
        },
    }
    if zero.offload is Offload.none:
        del sections["zero_optimization"]["offload_optimizer"]
    if zero.stage > 0:
        sections |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return sections
