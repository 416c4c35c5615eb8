"""Low-rank terms beside split layers are the dense formula: output, all gradients, the number of collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from layouts import assemble
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.parallel.lora import merge
from opt_parallel.parallel.topology import Group

WIDTH, INNER, RANK, ALPHA = 8, 12, 3, 5.0
BLOCKS = {"column then row": (0,), "q and v": (0, 2), "v": (2,), "all three": (0, 1, 2)}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order


class Product(nn.Module):
    """A column-parallel layer, of one block or three, and a row-parallel one, both with a low-rank term."""

    def __init__(self, name: str, group: Group) -> None:
        from opt_parallel.parallel.linear import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        self.blocks = 1 if name == "column then row" else 3
        self.column = ColumnParallelLinear(WIDTH, INNER, group, 0.5, blocks=self.blocks)
        self.row = RowParallelLinear(INNER, WIDTH, group, 0.5)
        self.requires_grad_(False)
        self.column.adapt(RANK, ALPHA, BLOCKS[name])
        self.row.adapt(RANK, ALPHA)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.row(mixed(self.column(hidden), self.blocks))


def mixed(product: Tensor, blocks: int) -> Tensor:
    """(…, blocks · n) → (…, n), no block standing for another."""
    return sum((part.sin() * (n + 1) for n, part in enumerate(product.chunk(blocks, dim=-1))), torch.zeros(()))


def values_of(name: str, shard: Any) -> Tensor:
    """Random everywhere: B is not at its zero."""
    import dataclasses

    from opt_parallel.parallel.shard import Normal, random_source

    return random_source(7)(name, dataclasses.replace(shard, initial=Normal(0.5)))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden, upstream = torch.randn(2, 2, 5, WIDTH, dtype=torch.float64, generator=generator)
    return hidden.requires_grad_(), upstream


def split(name: str, size: int) -> tuple[Tensor, Tensor, dict[str, Any], dict[str, int], list[str]]:
    """On the crew: output, input gradient, this rank's parts of the gradients, the collectives of forward and
    backward by the elements they carry, and the names of the parameters without a gradient."""
    from opt_parallel.parallel import collectives
    from opt_parallel.parallel.shard import fill, marked
    from opt_parallel.parallel.topology import Topology

    sent: list[str] = []
    real = collectives.dist.all_reduce

    def counted(tensor: Tensor, *rest: Any, **named: Any) -> Any:
        sent.append(f"{when} {tensor.size(-1)}")
        return real(tensor, *rest, **named)

    with Topology.open(size) as topology:
        with torch.device("meta"):
            model = Product(name, topology.tensor)
        fill(model, values_of, torch.device("cpu"), torch.float64)
        hidden, upstream = inputs()
        collectives.dist.all_reduce = counted
        try:
            when = "forward"
            output = model(hidden)
            when = "backward"
            output.backward(upstream)
        finally:
            collectives.dist.all_reduce = real
        gradients = {
            parameter: (shard.shape, shard.range, tensor.grad[shard.real].numpy())
            for parameter, tensor, shard in marked(model)
            if tensor.grad is not None
        }
        without = [parameter for parameter, tensor in model.named_parameters() if tensor.grad is None]
        assert hidden.grad is not None
        return output.detach(), hidden.grad, gradients, dict(Counter(sent)), without


def plain(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """W x + b + (alpha / rank) · B A x, written out: output, input gradient, the gradients of A and B."""
    from opt_parallel.parallel.shard import shard_of

    with torch.device("meta"):
        empty = Product(name, Group(None, 0, 1))
    tensors = {each: values_of(each, shard_of(tensor)).double() for each, tensor in empty.named_parameters()}
    for each, tensor in tensors.items():
        tensor.requires_grad_("lora" in each)
    blocks, several = BLOCKS[name], empty.blocks > 1
    hidden, upstream = inputs()
    parts = []
    for block in range(empty.blocks):
        of = (lambda kind, n: tensors[f"column.{kind}"][n]) if several else lambda kind, n: tensors[f"column.{kind}"]
        part = hidden @ of("weight", block).T + of("bias", block)
        if block in blocks:
            place = blocks.index(block)
            part = part + ALPHA / RANK * hidden @ of("lora_a", place).T @ of("lora_b", place).T
        parts.append(part)
    between = mixed(torch.cat(parts, dim=-1), empty.blocks)
    output = F.linear(between, tensors["row.weight"], tensors["row.bias"])
    output = output + ALPHA / RANK * between @ tensors["row.lora_a"].T @ tensors["row.lora_b"].T
    output.backward(upstream)
    assert hidden.grad is not None
    return output.detach(), hidden.grad, {each: t.grad for each, t in tensors.items() if t.grad is not None}


# by default all blocks on two ranks, and one each on one rank and on four
SIZES = [("column then row", 2), ("q and v", 2), ("v", 2), ("all three", 2), ("q and v", 1), ("all three", 4)]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[pytest.mark.long] * ((name, size) not in SIZES))
        for name in BLOCKS
        for size in (1, 2, 4)
    ],
)
def test_equals_the_plain_formula(crew: Any, name: str, size: int) -> None:
    output, input_gradient, gradients = plain(name)
    answers = crew(size)(split, name, size)
    for other_output, other_gradient, _, sent, without in answers:
        torch.testing.assert_close(other_output, output, **EXACT)
        torch.testing.assert_close(other_gradient, input_gradient, **EXACT)
        # besides one of the width each way, the small ones: A x of the row forward, of the column's copies backward
        small = RANK * len(BLOCKS[name])
        expected = {f"forward {WIDTH}": 1, f"forward {RANK}": 1, f"backward {WIDTH}": 1, f"backward {small}": 1}
        assert sent == (expected if size > 1 else {})
        assert without == ["column.weight", "column.bias", "row.weight", "row.bias"]
    found = assemble([each[2] for each in answers])
    assert found.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(found[parameter], gradient, **EXACT)


def test_merging_is_the_same_function_and_any_range_of_it_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, a, b, hidden = (torch.randn(shape, generator=generator) for shape in ((40, 24), (4, 24), (40, 4), (7, 24)))
    merged = weight.clone()
    merge(merged, a, b, 0.75)
    expected = hidden @ weight.T + 0.75 * hidden @ a.T @ b.T
    torch.testing.assert_close(hidden @ merged.T, expected)  # the default of float32: sums in another order
    for rows, columns in ((slice(3, 17), slice(0, 24)), (slice(0, 40), slice(5, 6))):
        part = weight[rows, columns].clone()
        merge(part, a[:, columns], b[rows], 0.75)
        assert torch.equal(part, merged[rows, columns])
