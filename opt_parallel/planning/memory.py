"""The memory of the rank that needs most, by kind."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from opt_parallel.planning.activations import Activations, activations, at_the_first_layer, part_bytes
from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.fsdp import part as fully_split
from opt_parallel.planning.megatron import part as megatron_part
from opt_parallel.planning.saving import saved_bytes
from opt_parallel.planning.states import Held, held
from opt_parallel.planning.workload import Recompute, Trainer, Workload

CONTEXT = 600 * 2**20  # the driver's context with the kernels of torch and its libraries
COMMUNICATOR = 250 * 2**20  # buffers of one of NCCL's communicators
EAGER_FRAGMENTATION = 0.07  # of torchtitan without torch.compile: fitted to TT6
FRAGMENTATION = 0.03  # of the bytes of tensors, which the allocator holds beside them


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at the moment of the step when most exist, `peak_at`.

    `gathered` are ZeRO-3's unsplit weights, `buffers` the gradients on their way, `logits` a chunk of the loss with its
    gradients, `reserved` what the allocator holds and does not use, `context` the driver's context, the libraries'
    kernels and the communicators' buffers. `allocated` is what torch.cuda.max_memory_allocated reports. `host` are
    bytes of the host's memory for each device: offloaded states and inputs, and the copy of a checkpoint that is
    written while training goes on."""

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    logits: int
    buffers: int
    gathered: int
    reserved: int
    context: int
    host: int
    peak_at: str

    def kinds(self) -> dict[str, int]:
        """Bytes on the device by kind."""
        skip = ("host", "peak_at")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skip}

    @property
    def allocated(self) -> int:
        return self.total - self.reserved - self.context

    @property
    def total(self) -> int:
        return sum(self.kinds().values())


def memory(workload: Workload, cluster: Cluster) -> Memory:
    """The memory of the fullest rank."""
    return of_this_trainer(workload) if workload.trainer is Trainer.ours else _of_others(workload, cluster)


def _of_others(workload: Workload, cluster: Cluster) -> Memory:
    """The memory of a rank of another trainer, of the pipeline stage that its publication gives."""
    split = fully_split(workload) if workload.stage == 3 else None
    each = split or megatron_part(workload, cluster.device.name, workload.stage_memory == "last")
    fragments = 0.0 if workload.compiled else EAGER_FRAGMENTATION
    return Memory(
        weights=each.weights,
        gradients=each.gradients,
        masters=each.masters,
        moments=each.moments,
        activations=each.activations,
        logits=each.logits,
        buffers=0 if split else workload.workspace,
        gathered=split.gathered if split else 0,
        reserved=round(each.total * fragments),
        context=CONTEXT + communicators(workload) * COMMUNICATOR,
        host=0,
        peak_at=split.peak_at if split else "the loss",
    )


def of_this_trainer(workload: Workload) -> Memory:
    """The memory of the fullest rank of this trainer, which does not depend on the cluster."""
    states, act = held(workload), activations(workload)
    if workload.stage == 0 and workload.accumulation == 1:
        states, act = _with_growing_gradients(workload, states)
    allocated = sum(vars(states).values()) - states.host + act.total
    return Memory(
        weights=states.weights,
        gradients=states.gradients,
        masters=states.masters,
        moments=states.moments,
        activations=act.saved + act.temporary,
        logits=act.logits,
        buffers=states.buffers,
        gathered=states.gathered,
        reserved=round(allocated * FRAGMENTATION),
        context=CONTEXT + communicators(workload) * COMMUNICATOR,
        host=states.host + _host(workload),
        peak_at=act.peak_at,
    )


def _with_growing_gradients(workload: Workload, states: Held) -> tuple[Held, Activations]:
    """Stage 0 with one micro-batch: gradients come into being in the backward, while activations are freed. So the peak
    is before the first gradient or after the last."""
    before, after = activations(workload), at_the_first_layer(workload)
    if before.total > states.gradients + after.total:
        return replace(states, gradients=0), before
    return states, after


def communicators(workload: Workload) -> int:
    """Groups of several ranks whose communicators hold buffers on the device."""
    return sum(size > 1 for size in (workload.tensor, workload.data, workload.pipeline, workload.context))


def _host(workload: Workload) -> int:
    """The copy of a checkpoint that is written during training, and offloaded inputs of the layers."""
    inputs = workload.network.layers * part_bytes(workload) if workload.recompute is Recompute.offload else 0
    return saved_bytes(workload) + inputs
