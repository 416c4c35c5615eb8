"""Checks that ranks which must hold equal values do: a bit that flips on one rank is found at the next save."""

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

INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of a value
ROUNDING = 1e-2  # of the largest value: Adam scales even a gradient that is only rounding to a full step
_say_once = functools.cache(say)


def differing(replicas: Iterable[Replica], topology: Topology) -> str | None:
    """A message that names the rank with other values than its peers, and the parameter; None if all agree. Every rank
    calls this and gets the same result.

    Reads every value once, on its device. Sends two integers per replica, and more only if ranks differ.

    On GPUs NCCL may sum the gradients of more than two data ranks in another order for each tensor rank. Tensor ranks
    may therefore differ by rounding. This is a warning, not an error: the first tensor rank's values are saved."""
    held = [replica for replica in replicas if replica.in_data or replica.in_tensor]
    sums = torch.stack([_sum_of_bits(each.values) for each in held]).tolist() if held else []
    differ: dict[str, tuple[Replica, int]] = {}
    for group, axis in ((topology.data, "in_data"), (topology.tensor, "in_tensor")):
        shared = [(each, value) for each, value in zip(held, sums, strict=True) if getattr(each, axis)]
        same = _same([value for _, value in shared], group)
        other_order = group is topology.tensor and topology.device.type == "cuda" and topology.data.size > 2
        for each, value in itertools.compress(shared, [not equal for equal in same]):
            if other_order and _spread(each.values, group) <= ROUNDING:
                _say_once("warning: parameters that tensor ranks share differ by rounding; the first rank's are saved")
            else:
                differ[each.name] = each, value
    if not topology.any(bool(differ)):
        return None
    found = topology.exchange({name: (value, each.in_data, each.in_tensor) for name, (each, value) in differ.items()})
    return _describe(found, topology)


def _sum_of_bits(values: Tensor) -> Tensor:
    """The sum of the values' bit patterns as wrapping integers: a single changed value always changes the sum."""
    integer = INTEGERS[values.element_size()]
    return values.view(-1).view(integer).sum(dtype=integer).long()


def _same(values: list[int], group: Group) -> list[bool]:
    """For each of `values`, whether it is equal on all ranks of the group."""
    if group.size == 1 or not values:
        return [True] * len(values)
    largest = torch.tensor([values, [-value for value in values]])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.handle)
    return (largest[0] == -largest[1]).tolist()


def _spread(values: Tensor, group: Group) -> float:
    """The largest difference between the group's ranks, relative to the largest value; NaN if a value is NaN."""
    largest, smallest = (values.to(torch.float32, copy=True) for _ in range(2))
    for ends, operation in ((largest, dist.ReduceOp.MAX), (smallest, dist.ReduceOp.MIN)):
        dist.all_reduce(ends, operation, group=group.handle)
    return float((largest - smallest).max() / torch.maximum(largest.abs(), smallest.abs()).max())


def _describe(found: list[dict[str, tuple[int, bool, bool]]], topology: Topology) -> str:
    """`found`: for each rank and parameter, a sum that differs within one of its groups, and whether it should be equal
    in the data and in the tensor group."""
    names = list(dict.fromkeys(name for sums in found for name in sums))
    holders = {rank: sums[names[0]] for rank, sums in enumerate(found) if names[0] in sums}
    first, (_, in_data, in_tensor) = next(iter(holders.items()))
    size = topology.tensor.size
    sharing = {
        rank: value
        for rank, (value, _, _) in holders.items()
        if (in_tensor or rank % size == first % size) and (in_data or rank // size == first // size)
    }
    ((usual, number), *_) = Counter(sharing.values()).most_common()
    odd = topology.where(next(rank for rank, value in sharing.items() if value != usual))
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    if number == 1:  # two ranks, and either may be wrong
        return f"{topology.where(first)} and {odd} hold different values of {names[0]}{more}"
    return f"{odd} holds other values of {names[0]}{more} than {number} other ranks"
