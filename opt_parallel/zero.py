"""Where a rank's training state lies under each ZeRO stage: fp32 weights and the optimizer's moments, as live views.

Nothing is copied here: what is written into a fragment is what the optimizer goes on with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opt_parallel.parallel.shard import Shard, marked, trained
from opt_parallel.parallel.topology import Topology


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start` + n of a parameter's flattened tensor-parallel part, padding included.

    `weights` (n,) fp32; `moments`: each of the optimizer's (n,), or none before the first optimizer step."""

    name: str
    shard: Shard
    start: int
    weights: Tensor
    moments: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is to save, by kind."""
        return {"weights": self.weights, **self.moments}

    def narrow(self, first: int, last: int) -> Fragment:
        """Elements `first` to `last` of this fragment."""
        moments = {kind: values[first:last] for kind, values in self.moments.items()}
        return Fragment(self.name, self.shard, self.start + first, self.weights[first:last], moments)


def held_fragments(wrapped: Any, stage: int, data_rank: int, moments: tuple[str, ...]) -> Iterator[Fragment]:
    """All that this rank holds of what is trained, at most one fragment of each parameter. `moments` names the
    optimizer's, as `optim.Optimizer` does."""
    base = base_optimizer(wrapped)
    for name, tensor, shard in trained(wrapped.module):
        place = _place(wrapped, stage, data_rank, tensor)
        if place is None:
            continue
        flat, start, offset, count = place
        state = base.state.get(flat, {})
        parts = {kind: state[kind].view(-1)[offset : offset + count] for kind in moments if kind in state}
        yield Fragment(name, shard, start, flat.detach().view(-1)[offset : offset + count], parts)


def owned_fragments(wrapped: Any, stage: int, topology: Topology, moments: tuple[str, ...]) -> Iterator[Fragment]:
    """What this rank saves: of everything that several ranks hold, one of them a part.

    Whole parameters are the first tensor rank's; at stage 0, where all data ranks hold all, each has a share."""
    for fragment in held_fragments(wrapped, stage, topology.data.rank, moments):
        if fragment.shard.count < topology.tensor.size and topology.tensor.rank > 0:
            continue
        owned = fragment
        if stage == 0:
            share = -(-len(fragment.weights) // topology.data.size)
            owned = fragment.narrow(topology.data.rank * share, (topology.data.rank + 1) * share)
        if len(owned.weights):
            yield owned


@dataclass(frozen=True)
class Replica:
    """Values that other ranks hold, too: those of the data group, of the tensor group, or of both."""

    name: str
    values: Tensor
    in_data: bool
    in_tensor: bool


def replicas(wrapped: Any, stage: int, topology: Topology, moments: tuple[str, ...]) -> Iterator[Replica]:
    """All that this rank holds and others must hold to the same bit, frozen parameters too.

    The weights that the network computes with are the same over the data group, but for stage 3, which splits them;
    fp32 weights and moments are so at stage 0 alone. Over the tensor group everything of a whole parameter is."""
    several = topology.data.size > 1
    for name, tensor, shard in marked(wrapped.module):
        whole = shard.count < topology.tensor.size
        if stage < 3:
            yield Replica(name, tensor.detach(), several, whole)
        else:
            part = tensor.ds_tensor  # type: ignore[attr-defined]
            rest = tensor.ds_numel - topology.data.rank * part.ds_numel  # type: ignore[attr-defined]
            yield Replica(name, part.detach()[: max(rest, 0)], False, whole)
    for fragment in held_fragments(wrapped, stage, topology.data.rank, moments):
        whole = fragment.shard.count < topology.tensor.size
        for kind, values in (fragment.moments if stage == 0 else fragment.tensors).items():
            yield Replica(f"{kind} of {fragment.name}", values, several and stage == 0, whole)


def reset_moments(wrapped: Any, stage: int, moments: tuple[str, ...], updates: int) -> None:
    """Set the optimizer's count of `updates`, and its moments to zero; before the first update it has none."""
    base = base_optimizer(wrapped)
    for flat in _flat_weights(wrapped, stage):
        if updates == 0:
            base.state.pop(flat, None)
            continue
        base.state[flat] = {
            "step": torch.full((), float(updates), device=flat.device),
            **{kind: torch.zeros_like(flat) for kind in moments},
        }


def refresh_working_weights(wrapped: Any, stage: int) -> None:
    """Round the fp32 weights to those that the network computes with, as DeepSpeed does at the end of a step.

    Stage 0 computes with the fp32 weights themselves."""
    optimizer = wrapped.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # splits the small parameters that stay gathered
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers these again


def updates_made(wrapped: Any, stage: int) -> int:
    """Optimizer steps so far; those that fp16 skipped do not count."""
    state = base_optimizer(wrapped).state.get(_flat_weights(wrapped, stage)[0], {})
    return int(state["step"]) if "step" in state else 0


def base_optimizer(wrapped: Any) -> torch.optim.Optimizer:
    """The torch optimizer within DeepSpeed's, or DeepSpeed's own where there is nothing around it."""
    base = getattr(wrapped.optimizer, "optimizer", wrapped.optimizer)
    assert isinstance(base, torch.optim.Optimizer)
    return base


def _flat_weights(wrapped: Any, stage: int) -> list[Tensor]:
    """The tensors that the torch optimizer steps: at stage 0 parameters, else this rank's flat fp32 partitions."""
    if stage == 3:
        return list(wrapped.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in base_optimizer(wrapped).param_groups for flat in group["params"]]


def _place(wrapped: Any, stage: int, data_rank: int, tensor: Tensor) -> tuple[Tensor, int, int, int] | None:
    """Where this rank's fp32 elements of a parameter are: the flat tensor, the first element's number within the
    parameter, its offset within the flat tensor, and how many; None if this rank has none."""
    if stage == 0:
        return tensor, 0, 0, tensor.numel()
    if stage == 3:
        optimizer = wrapped.optimizer
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(tensor)]
        start = data_rank * size
        count = min(size, tensor.ds_numel - start)  # type: ignore[attr-defined]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return (flat, start, offset, count) if count > 0 else None
    mapping = tensor._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    flat = base_optimizer(wrapped).param_groups[mapping.param_group_index]["params"][0]
    return flat, mapping.lp_fragment_address.start, mapping.hp_fragment_address.start, mapping.lp_fragment_address.numel
