"""The optimizer steps of a run, computed with DeepSpeed ZeRO. Only this module imports DeepSpeed."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import numa
from torch import Tensor, nn

from opt_parallel.config.model import Labels
from opt_parallel.config.run import Offload, Precision, Run
from opt_parallel.data.samples.batches import Totals
from opt_parallel.data.samples.samples import Batch
from opt_parallel.model.build import network
from opt_parallel.optim import OPTIMIZERS, LossScaler, build_optimizer, clip_gradients, gradient_norm, learning_rate
from opt_parallel.parallel.collectives import all_reduce, all_reduce_in_place
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import Source, fill, trained
from opt_parallel.parallel.topology import DTYPES, Topology
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import Diverged, UserError
from opt_parallel.zero import (
    Fragment,
    Replica,
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
    """The result of an optimizer step. Reading a 0-d tensor of the result waits for the device.

    `loss` is the mean over the targets of the global batch. `tokens` is the number of tokens in the global batch
    without padding. `skipped` is true if fp16 gradients overflowed, so that the weights did not change.
    """

    loss: Tensor
    grad_norm: Tensor
    lr: float
    tokens: int
    loss_scale: float | None
    skipped: bool


class Engine:
    """A model wrapped by DeepSpeed ZeRO, with optimizer steps, evaluation, and views of the training state."""

    def __init__(self, run: Run, topology: Topology, wrapped: Any) -> None:
        self.run, self.topology, self.moments = run, topology, OPTIMIZERS[run.optimizer.name].moments
        self.wrapped = wrapped  # deepspeed.DeepSpeedEngine.
        # ZeRO-1 in bf16 keeps all fp32 gradients in flat buffers. DeepSpeed would copy these gradients to another
        # buffer, round the copy to bf16, reduce it and copy it back, which takes a third of a small model's step. The
        # engine instead reduces the flat buffers in place in fp32.
        self.flat_gradients: list[Tensor] = []
        if isinstance(wrapped.optimizer, BF16_Optimizer):
            assert wrapped.optimizer.grad_acc_dtype is torch.float32
            self.flat_gradients = wrapped.optimizer.fp32_groups_gradients_flat
            wrapped.enable_backward_allreduce = False
        self.scaler = LossScaler(run.precision) if run.precision.name is Precision.fp16 else None
        if self.scaler is not None:
            wrapped.optimizer.loss_scaler = self.scaler

    @classmethod
    def build(cls, run: Run, topology: Topology, source: Source, labels: Labels | None = None) -> Engine:
        """The run's model with weights from `source`, wrapped by DeepSpeed. `labels` are the labels of a classifier."""
        model = network(run.model, run.task.lora, labels, topology.tensor, run.activation_checkpointing)
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
        loop passes `totals`, which it exchanged during the previous step, and otherwise N is summed here. The
        loss of a micro-batch is its sum / N. DeepSpeed averages gradients over the data ranks, so the loss is
        multiplied by `data.size`. The flat gradients of ZeRO-1 in bf16 are summed, so they need no factor `data.size`.

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
        if self.scaler is not None:
            self.scaler.begin_step(targets / data.size)
        weight = (1 if self.flat_gradients else data.size) / targets
        total = torch.zeros((), device=self.topology.device)
        self.wrapped.train()
        for micro, batch in enumerate(batches):
            loss = self._loss(batch.to(self.topology.device), step, micro)
            total += loss.detach()
            self.wrapped.backward(loss * weight, scale_wrt_gas=False)
            if micro < len(batches) - 1:
                self.wrapped.step()  # this call only counts the micro-batch
        loss_scale = None if self.scaler is None else self.scaler.scale
        norm = self._apply(step)
        # A recomputation ends inside a layer, so DeepSpeed would keep the layer on this list for the rest of the run.
        del FWD_MODULE_STACK[1:]
        skipped = bool(getattr(self.wrapped.optimizer, "overflow", False))
        if skipped and self.scaler is None:
            raise _diverged(step)
        return StepResult(all_reduce(total, data) / targets, norm, lr, tokens, loss_scale, skipped)

    def _totals(self, batches: list[Batch]) -> Totals:
        data, topology = self.topology.data, self.topology
        return Totals(
            topology.sum(sum(batch.targets for batch in batches), data),
            topology.sum(sum(batch.tokens for batch in batches), data),
        )

    def _loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        draw = Draw(self.run.seed, step, micro, self.topology.data.rank, batch.samples)
        loss = self.wrapped(batch.ids, batch.labels, batch.positions, batch.segments, draw)
        assert isinstance(loss, Tensor)
        return loss

    def _apply(self, step: int) -> Tensor:
        """Update the weights and return the gradient norm before clipping, a 0-d tensor."""
        if self.run.zero.stage > 0:
            for gradients in self.flat_gradients:
                all_reduce_in_place(gradients, self.topology.data)
            self.wrapped.step()
            norm = self.wrapped.get_global_grad_norm()
            return torch.as_tensor(float("nan") if norm is None else norm)
        norm = gradient_norm(self.wrapped.module, self.topology.tensor)  # DeepSpeed computes no norm at stage 0
        if not bool(norm.isfinite()):
            raise _diverged(step)
        if self.run.optimizer.clip > 0:
            clip_gradients(self.wrapped.module, norm, self.run.optimizer.clip)
        self.wrapped.step()
        return norm

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

    def restore(self, read: Callable[[Fragment], None], updates: int, loss_scale: dict[str, Any] | None) -> None:
        """Load a saved training state. `read` fills each fragment of this rank's weights and moments in place."""
        stage = self.run.zero.stage
        reset_moments(self.wrapped, stage, self.moments, updates)
        for fragment in held_fragments(self.wrapped, stage, self.topology.data.rank, self.moments):
            read(fragment)
        refresh_working_weights(self.wrapped, stage)
        if self.scaler is not None and loss_scale is not None:
            self.scaler.load_state(loss_scale)

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks, so that this process can build another engine."""
        self.wrapped.destroy()
        _forget_models()


def _forget_models() -> None:
    """Remove the models of ZeRO-3 from the two places where DeepSpeed keeps them until the process ends: a global list,
    and the cache of a decorated method. A model that stays keeps its process groups and their threads."""
    FWD_MODULE_STACK.clear()
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    cached.__closure__[0].cell_contents.cache_clear()


def _diverged(step: int) -> Diverged:
    return Diverged(
        f"step {step + 1}: the gradients are not finite, so the weights were not updated: resume from the last "
        "checkpoint with a lower optimizer.lr or another seed"
    )


def deepspeed_settings(run: Run, topology: Topology) -> dict[str, Any]:
    """The configuration dictionary that DeepSpeed needs for the run."""
    zero = run.zero
    on_gpu = topology.device.type == "cuda"
    sections: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": run.global_batch // (run.micro_batch * topology.data.size),
        "gradient_clipping": run.optimizer.clip if zero.stage > 0 else 0.0,  # else Engine._apply clips
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": run.precision.name is Precision.bf16},
        "fp16": {"enabled": run.precision.name is Precision.fp16, "loss_scale": 0},
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "allgather_bucket_size": zero.allgather_bucket_size,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            "offload_optimizer": {"device": zero.offload.value, "pin_memory": on_gpu},
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
        },
    }
    if zero.offload is Offload.none:
        del sections["zero_optimization"]["offload_optimizer"]
    if run.precision.name is Precision.bf16:
        sections["data_types"] = {"grad_accum_dtype": "fp32"}
    return sections
