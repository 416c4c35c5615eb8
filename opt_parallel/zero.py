"""Live views of a rank's training state, which is the optimizer's weights and moments, under each ZeRO stage.

The weights are the fp32 copy that the optimizer updates, or the working weights with `optimizer.state_dtype=bf16`.

The views copy no values, so writing to a fragment changes the optimizer's state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opt_parallel.parallel.random import number
from opt_parallel.parallel.rounding import Piece
from opt_parallel.parallel.shard import Shard, marked, trained
from opt_parallel.parallel.topology import Topology


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start` + n of the flattened shard of a parameter, including padding.

    `weights` is a tensor (n,), and `moments` maps names to tensors (n,), all in the dtype `optimizer.state_dtype`.
    `moments` is empty before the first optimizer step."""

    name: str
    shard: Shard
    start: int
    weights: Tensor
    moments: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fragment's weights and moments, by the names under which checkpoints store them."""
        return {"weights": self.weights, **self.moments}

    def narrow(self, first: int, last: int) -> Fragment:
        """The part of this fragment from element `first` to element `last`."""
        moments = {kind: values[first:last] for kind, values in self.moments.items()}
        return Fragment(self.name, self.shard, self.start + first, self.weights[first:last], moments)


def held_fragments(wrapped: Any, stage: int, data_rank: int, moments: tuple[str, ...]) -> Iterator[Fragment]:
    """This rank's fragments of the trained parameters, with at most one fragment for each parameter. `moments` are the
    names of the moments, see `optim.OptimizerKind`."""
    base = base_optimizer(wrapped)
    for name, tensor, shard in trained(wrapped.module):
        address = _address(wrapped, stage, data_rank, tensor)
        if address is None:
            continue
        flat, start, offset, count = address
        state = base.state.get(flat, {})  # empty before the first step
        parts = {kind: state[kind].view(-1)[offset : offset + count] for kind in moments} if state else {}
        yield Fragment(name, shard, start, flat.detach().view(-1)[offset : offset + count], parts)


def owned_fragments(wrapped: Any, stage: int, topology: Topology, moments: tuple[str, ...]) -> Iterator[Fragment]:
    """The fragments that this rank saves, so that each element is saved once.

    Tensor rank 0 saves replicated parameters. At stage 0 each data rank holds the complete training state and saves an
    equal share."""
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
    """Values of a rank of which other ranks hold copies. The ranks with copies are in the data group (`in_data`), the
    tensor group (`in_tensor`), or both groups."""

    name: str
    values: Tensor
    in_data: bool
    in_tensor: bool


def replicas(wrapped: Any, stage: int, topology: Topology, moments: tuple[str, ...]) -> Iterator[Replica]:
    """All values of this rank of which other ranks hold copies with equal bits, including frozen parameters.

    In a data group, the working weights are equal at stages 0 to 2, and the fp32 weights and moments are equal only at
    stage 0. In a tensor group, the weights and moments of a replicated parameter are equal."""
    several = topology.data.size > 1
    for name, tensor, shard in marked(wrapped.module):
        in_tensor = shard.count < topology.tensor.size
        if stage < 3:
            yield Replica(name, tensor.detach(), several, in_tensor)
        else:
            part = tensor.ds_tensor  # type: ignore[attr-defined]
            rest = tensor.ds_numel - topology.data.rank * part.ds_numel  # type: ignore[attr-defined]
            yield Replica(name, part.detach()[: max(rest, 0)], False, in_tensor)
    for fragment in held_fragments(wrapped, stage, topology.data.rank, moments):
        in_tensor = fragment.shard.count < topology.tensor.size
        for kind, values in (fragment.moments if stage == 0 else fragment.tensors).items():
            yield Replica(f"{kind} of {fragment.name}", values, several and stage == 0, in_tensor)


def reset_moments(wrapped: Any, stage: int, moments: tuple[str, ...], updates: int) -> None:
    """Set the optimizer's step count to `updates` and its moments to zero. If `updates` is 0, delete the optimizer's
    state."""
    base = base_optimizer(wrapped)
    for flat in flat_weights(wrapped, stage):
        if updates == 0:
            base.state.pop(flat, None)
            continue
        base.state[flat] = {
            "step": torch.full((), float(updates), device=flat.device),
            **{kind: torch.zeros_like(flat) for kind in moments},
        }


def refresh_working_weights(wrapped: Any, stage: int) -> None:
    """Round the optimizer's weights to the dtype of the working weights and store them there, as DeepSpeed does at the
    end of a step.

    At stage 0 the optimizer's weights are the working weights."""
    optimizer = wrapped.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # this call partitions the small parameters that stay gathered
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # this call gathers the small parameters again


def updates_made(wrapped: Any, stage: int) -> int:
    """The number of weight updates so far. Steps that fp16 skipped are not counted."""
    state = base_optimizer(wrapped).state.get(flat_weights(wrapped, stage)[0], {})
    return int(state["step"]) if state else 0


def base_optimizer(wrapped: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's optimizer."""
    base = getattr(wrapped.optimizer, "optimizer", wrapped.optimizer)
    assert isinstance(base, torch.optim.Optimizer)
    return base


def keep_copy(wrapped: Any, stage: int, data_rank: int, seed: int) -> None:
    """Let the optimizer update DeepSpeed's fp32 copy of the weights, which is ready for this."""


def share_weights(wrapped: Any, stage: int, data_rank: int, seed: int) -> None:
    """Let the optimizer update this rank's part of the bf16 working weights, so that there is no second copy. The
    gradients of this part remain fp32. The optimizer's `pieces` then describe the part."""
    optimizer = wrapped.optimizer
    if stage == 3:
        parts = optimizer.fp16_partitioned_groups_flat
    else:
        parts = [group[data_rank] for group in optimizer.parallel_partitioned_bit16_groups]
    for weights, part in zip(flat_weights(wrapped, stage), parts, strict=True):
        weights.data, weights.grad_dtype = part, torch.float32
    if stage < 3:
        optimizer._link_all_hp_params()  # DeepSpeed's links to the copy would keep it in memory
    optimizer.optimizer.pieces = _pieces(wrapped, stage, data_rank, seed)


def _pieces(wrapped: Any, stage: int, data_rank: int, seed: int) -> dict[Tensor, list[Piece]]:
    """The parts of the parameters in each tensor that the torch optimizer updates."""
    found: dict[Tensor, list[Piece]] = defaultdict(list)
    for name, tensor, shard in trained(wrapped.module):
        address = _address(wrapped, stage, data_rank, tensor)
        if address is not None:
            flat, start, offset, count = address
            found[flat].append(Piece(number("rounding", seed, name, bits=62), shard, start, offset, count))
    return found


def flat_weights(wrapped: Any, stage: int) -> list[Tensor]:
    """The tensors that the torch optimizer updates, which are the parameters at stage 0, and this rank's flat
    partitions at other stages."""
    if stage == 3:
        return list(wrapped.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in base_optimizer(wrapped).param_groups for flat in group["params"]]


def _address(wrapped: Any, stage: int, data_rank: int, tensor: Tensor) -> tuple[Tensor, int, int, int] | None:
    """The position of this rank's elements of a parameter in the optimizer's weights, or None if this rank has no
    elements of it. The tuple holds the flat tensor, the first element's index in the flattened shard, its offset in the
    flat tensor, and the number of elements."""
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
