"""Checks that copies of a value on several ranks are equal, so that a flipped bit is found at the next save."""

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

INTEGERS = {2: torch.int16, 4: torch.int32}  # The integer type with this number of bytes.
ROUNDING = 1e-2  # Relative to the largest value. Adam turns even rounding errors of a gradient into full steps.
_say_once = functools.cache(say)


def differing(replicas: Iterable[Replica], topology: Topology) -> str | None:
    """A message that names a parameter and the rank whose values differ, or None if all values are equal.

    Every rank must call this function and gets the same result. Each value is read once, on its device. Each rank sends
    two integers per parameter, and more data only if ranks differ.

    On GPUs, NCCL may sum the gradients of more than two data ranks in a different order on each tensor rank. So the
    ranks of a tensor group may differ by rounding. The values of the first rank are saved, and a warning is printed.
    """
    held = [replica for replica in replicas if replica.in_data or replica.in_tensor]
    sums = torch.stack([_sum_of_bits(each.values) for each in held]).tolist() if held else []
    differ: dict[str, tuple[Replica, int]] = {}
    for group, axis in ((topology.data, "in_data"), (topology.tensor, "in_tensor")):
        shared = [(each, value) for each, value in zip(held, sums, strict=True) if getattr(each, axis)]
        same = _same([value for _, value in shared], group)
        other_order = group is topology.tensor and topology.device.type == "cuda" and topology.data.size > 2
        for each, value in itertools.compress(shared, [not equal for equal in same]):
            if other_order and _spread(each.values, group) <= ROUNDING:
                _say_once(
                    "warning: copies of a parameter on the ranks of a tensor group differ by rounding; the first copy "
                    "is saved"
                )
            else:
                differ[each.name] = each, value
    if not topology.any(bool(differ)):
        return None
    found = topology.exchange({name: (value, each.in_data, each.in_tensor) for name, (each, value) in differ.items()})
    return _describe(found, topology)


def _sum_of_bits(values: Tensor) -> Tensor:
    """The sum of the values' bit patterns as integers that wrap around. A single changed value changes the sum."""
    integer = INTEGERS[values.element_size()]
    return values.view(-1).view(integer).sum(dtype=integer).long()


def _same(values: list[int], group: Group) -> list[bool]:
    """Whether each of the `values` is equal on all ranks of the group."""
    if group.size == 1 or not values:
        return [True] * len(values)
    largest = torch.tensor([values, [-value for value in values]])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group.handle)
    return (largest[0] == -largest[1]).tolist()


def _spread(values: Tensor, group: Group) -> float:
    """The largest difference between ranks of the group, relative to the largest value, or NaN if a value is NaN."""
    largest, smallest = (values.to(torch.float32, copy=True) for _ in range(2))
    for ends, operation in ((largest, dist.ReduceOp.MAX), (smallest, dist.ReduceOp.MIN)):
        dist.all_reduce(ends, operation, group=group.handle)
    return float((largest - smallest).max() / torch.maximum(largest.abs(), smallest.abs()).max())


def _describe(found: list[dict[str, tuple[int, bool, bool]]], topology: Topology) -> str:
    """A message that names the ranks with different values of a parameter.

    For each rank, `found` has the parameters whose sum differs within a group: the sum, and whether the values should
    be equal in the data group and in the tensor group."""
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
    if number == 1:  # either of the two ranks may be wrong
        return f"{topology.where(first)} and {odd} have different values of {names[0]}{more}"
    return f"{odd} has other values of {names[0]}{more} than {number} other ranks"
