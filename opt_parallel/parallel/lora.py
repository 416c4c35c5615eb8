"""Low-rank adaptation beside the split linear layers (Hu et al. 2021, LoRA, section 4.1).

    W x + (alpha / rank) · B A x       A (rank, in) random, B (out, rank) zero at the start, W frozen

A column-parallel layer has A whole on every rank and B split as W is, along the outputs; a row-parallel one has A
split along the inputs and B whole. What the ranks exchange is `rank` wide: for a column-parallel layer the gradient of
A x, for a row-parallel one A x itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.parallel.collectives import copy, reduce
from opt_parallel.parallel.shard import Normal
from opt_parallel.parallel.topology import Group

AT_ONCE = 2**22  # elements merged at a time


def initial_a(in_features: int) -> Normal:
    """As `peft` begins it: kaiming_uniform_ with a = √5 is uniform between ±1/√in, whose variance is 1 / (3 in). Ours
    is normal, of that variance."""
    return Normal((3 * in_features) ** -0.5)


def column_term(
    hidden: Tensor, a: Tensor, b: Tensor, scale: float, blocks: tuple[int, ...], count: int, group: Group
) -> Tensor:
    """(…, in) → (…, count · out/t), `scale` · B A `hidden` in each of `blocks`, zero in the others of `count`.

    `hidden` comes as it is before `copy`, the same on all ranks, and the copy is of A x: so each rank has the whole
    gradients of A and, by way of it, of `hidden`, and not its summand.

    Args:
        a: (n, rank, in), n the number of `blocks`, or (rank, in).
        b: (n, out/t, rank), or (out/t, rank).
    """
    narrow = copy(F.linear(hidden, a.flatten(0, -2)) * scale, group)
    parts = list(b.view(len(blocks), -1, b.size(-1)))
    nothing = b.new_empty(parts[0].size(0), 0)  # stands in the diagonal as rows of zeros
    return F.linear(narrow, torch.block_diag(*(parts.pop(0) if n in blocks else nothing for n in range(count))))


def row_term(part: Tensor, a: Tensor, b: Tensor, scale: float, group: Group) -> Tensor:
    """(…, in/t) → (…, out): `scale` · B Σ_i A_i y_i, the same on all ranks. `a` (rank, in/t), `b` (out, rank)."""
    return F.linear(reduce(F.linear(part, a) * scale, group), b)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Make `weight` (out, in), fp32, W + `scale` · B A. `a` (rank, in), `b` (out, rank).

    Summed in float64 and rounded once, so that the ranges of a tensor have the same bits, however it is cut."""
    a = a.double() * scale
    for rows in range(0, weight.size(0), max(1, AT_ONCE // weight.size(1))):
        some = slice(rows, rows + max(1, AT_ONCE // weight.size(1)))
        weight[some] = (weight[some].double() + b[some].double() @ a).float()
