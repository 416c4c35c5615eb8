"""Whether ranks that must hold the same values still do: a bit that flips in one of them is seen at the next save."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from opt_parallel.parallel.topology import Group, Topology
from opt_parallel.runtime.log import say
from opt_parallel.zero import Replica

INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of a number
ROUNDING = 1e-2  # of the largest value: Adam makes steps of equal size of gradients that are nothing but rounding
_say_once = functools.cache(say)


def differing(replicas: Iterable[Replica], topology: Topology) -> str | None:
    """Which rank holds other values than others do, and of what; None if all agree. Every rank takes part and gets the
    same answer.

    Reads every value once, where it lies. Two integers a replica are sent, and more only where ranks differ.

    On GPUs NCCL may add up the gradients of more than two data ranks in another order for each tensor rank. What they
    hold may therefore differ by rounding, which is said and no error: the first tensor rank's values are saved."""
    held = [replica for replica in replicas if replica.in_data or replica.in_tensor]
    sums = torch.stack([_sum_of_bits(each.values) for each in held]).tolist() if held else []
    apart: dict[str, tuple[Replica, int]] = {}
    for group, axis in ((topology.data, "in_data"), (topology.tensor, "in_tensor")):
        shared = [(each, value) for each, value in zip(held, sums, strict=True) if getattr(each, axis)]
        same = _same([value for _, value in shared], group)
        other_order = group is topology.tensor and topology.device.type == "cuda" and topology.data.size > 2
        for each, value in itertools.compress(shared, [not equal for equal in same]):
            if other_order and _spread(each.values, group) <= ROUNDING:
                _say_once("warning: parameters that tensor ranks share differ by rounding; the first rank's are saved")
            else:
                apart[each.name] = each, value
    if not topology.any(bool(apart)):
        return None
    told = topology.exchange({name: (value, each.in_data, each.in_tensor) for name, (each, value) in apart.items()})
    return _in_words(told, topology)


def _sum_of_bits(values: Tensor) -> Tensor:
    """The bit patterns, summed as integers that wrap: one changed number always gives another sum."""
    integer = INTEGERS[values.element_size()]
    return values.view(-1).view(integer).sum(dtype=integer).long()


def _same(values: list[int], group: Group) -> list[bool]:
    """Of each value, whether it is the same on all ranks of the group."""
    if group.size == 1 or not values:
        return [True] * len(values)
    largest = torch.tensor([values, [-value for value in values]])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.handle)
    return (largest[0] == -largest[1]).tolist()


def _spread(values: Tensor, group: Group) -> float:
    """The largest difference between the group's ranks, as a share of the largest value; NaN where one is none."""
    largest, smallest = (values.to(torch.float32, copy=True) for _ in range(2))
    for ends, operation in ((largest, dist.ReduceOp.MAX), (smallest, dist.ReduceOp.MIN)):
        dist.all_reduce(ends, operation, group=group.handle)
    return float((largest - smallest).max() / torch.maximum(largest.abs(), smallest.abs()).max())


def _in_words(told: list[dict[str, tuple[int, bool, bool]]], topology: Topology) -> str:
    """`told`: by rank, the sums that are not the same in all of its groups, and the axes along which they should be."""
    names = list(dict.fromkeys(name for sums in told for name in sums))
    tellers = {rank: sums[names[0]] for rank, sums in enumerate(told) if names[0] in sums}
    first, (_, in_data, in_tensor) = next(iter(tellers.items()))
    size = topology.tensor.size
    sharing = {
        rank: value
        for rank, (value, _, _) in tellers.items()
        if (in_tensor or rank % size == first % size) and (in_data or rank // size == first // size)
    }
    ((usual, number), *_) = Counter(sharing.values()).most_common()
    odd = topology.where(next(rank for rank, value in sharing.items() if value != usual))
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    if number == 1:  # nobody can tell which of the two is right
        return f"{topology.where(first)} and {odd} hold different values of {names[0]}{more}"
    return f"{odd} holds other values of {names[0]}{more} than {number} other ranks"
