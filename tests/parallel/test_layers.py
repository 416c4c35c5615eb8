"""Parallel layers are their unsplit selves: output, input gradient, every weight gradient, the weights after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import assemble
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.parallel.vocab import VocabParallelEmbedding, VocabParallelHead

SIZES = [1, 2, 4]
VOCABULARY, WIDTH, PAD = 11, 8, 1  # 11 divides by neither 2 nor 4: padded rows are in play


def column_then_row(group: Group) -> nn.Module:
    from opt_parallel.parallel.linear import ColumnParallelLinear, RowParallelLinear

    return nn.Sequential(
        ColumnParallelLinear(WIDTH, 16, group, 0.5), nn.Tanh(), RowParallelLinear(16, WIDTH, group, 0.5)
    )


def three_blocks(group: Group) -> nn.Module:
    from opt_parallel.parallel.linear import ColumnParallelLinear, RowParallelLinear

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.column = ColumnParallelLinear(WIDTH, 12, group, 0.5, blocks=3)
            self.row = RowParallelLinear(12, WIDTH, group, 0.5)

        def forward(self, hidden: Tensor) -> Tensor:
            first, second, third = self.column(hidden).chunk(3, dim=-1)
            return self.row(first * second + third)

    return Product()


def vocabulary(group: Group) -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = VocabParallelEmbedding(VOCABULARY, WIDTH, PAD, group, 0.5)
            self.head = VocabParallelHead(self.embedding)

        def forward(self, hidden: Tensor) -> Tensor:
            ids = torch.tensor([[0, PAD, 5], [10, 9, 3]])
            labels = torch.tensor([[10, 4, -100], [PAD, 0, 7]])
            embedded = self.embedding(ids) + hidden[:, :3]
            return torch.stack([self.head(embedded, labels), self.head(embedded).sin().sum()])

    return Tied()


LAYERS: dict[str, Callable[[Group], nn.Module]] = {
    "column then row": column_then_row, "three blocks": three_blocks, "vocabulary": vocabulary,
}  # fmt: skip


def one_step(name: str, size: int) -> tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]:
    """Output, input gradient, this rank's parts of the weights' gradients and of the weights after an SGD step."""
    from opt_parallel.parallel.shard import fill, marked, random_source
    from opt_parallel.parallel.topology import Topology

    with Topology.open(size) as topology:
        with torch.device("meta"):
            model = LAYERS[name](topology.tensor)
        fill(model, random_source(7), torch.device("cpu"), torch.float64)
        generator = torch.Generator().manual_seed(2)
        hidden = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        output = model(hidden)
        output.backward(torch.randn(output.shape, dtype=torch.float64, generator=generator))
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        gradients, weights = {}, {}
        for parameter, tensor, shard in marked(model):
            assert tensor.grad is not None
            gradients[parameter] = (shard.shape, shard.range, tensor.grad[shard.real].numpy())
            weights[parameter] = (shard.shape, shard.range, tensor.detach()[shard.real].numpy())
        assert hidden.grad is not None
        return output.detach(), hidden.grad, gradients, weights


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_one_process(crew: Any, name: str, size: int) -> None:
    [(output, input_gradient, gradients, weights)] = crew(1)(one_step, name, 1)
    answers = crew(size)(one_step, name, size)
    exact = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order
    for other_output, other_gradient, _, _ in answers:
        torch.testing.assert_close(other_output, output, **exact)
        torch.testing.assert_close(other_gradient, input_gradient, **exact)
    for single, parts in ((gradients, [a[2] for a in answers]), (weights, [a[3] for a in answers])):
        expected, found = assemble([single]), assemble(parts)
        for parameter, tensor in expected.items():
            torch.testing.assert_close(found[parameter], tensor, **exact)


def test_vocabulary_is_torchs_own(crew: Any) -> None:
    """The tied embedding and head on one process against torch.nn.functional: value and gradients."""
    [(output, input_gradient, gradients, _)] = crew(1)(one_step, "vocabulary", 1)
    from opt_parallel.parallel.shard import Normal, Shard, random_source

    shard = Shard((VOCABULARY, WIDTH), 0, 0, 1, Normal(0.5, zero_row=PAD), True)
    weight = random_source(7)("embedding.weight", shard).double().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    upstream = torch.randn(2, dtype=torch.float64, generator=generator)
    embedded = F.embedding(torch.tensor([[0, PAD, 5], [10, 9, 3]]), weight, padding_idx=PAD) + hidden[:, :3]
    logits = embedded @ weight.T
    labels = torch.tensor([[10, 4, -100], [PAD, 0, 7]])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected = torch.stack([loss, logits.sin().sum()])
    expected.backward(upstream)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(input_gradient, hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(assemble([gradients])["embedding.weight"], weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 16), (33, 1)])
def test_logits_without_a_gradient_to_come_are_the_same_product(shape: tuple[int, int]) -> None:
    from opt_parallel.parallel.vocab import logits

    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(*shape, 24, generator=generator), torch.randn(50, 24, generator=generator)
    with torch.no_grad():
        ours = logits(hidden, weight)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, F.linear(hidden, weight))  # the default of float32: sums in another order


@pytest.mark.parametrize("wrong", [-1, 515, 10**9])
def test_what_is_no_word_is_an_error(wrong: int) -> None:
    """At any tensor degree: each rank would take it for another's word."""
    embedding = VocabParallelEmbedding(515, 4, PAD, ALONE, 0.5)
    head = VocabParallelHead(embedding)
    with torch.no_grad():
        embedding.weight.fill_(0.1)
    ids = torch.tensor([[2, 514]])
    hidden = embedding(ids)
    assert head(hidden, torch.tensor([[-100, 514]])) > 0
    with pytest.raises(RuntimeError, match="an id is not in the vocabulary"):
        embedding(torch.tensor([[2, wrong]]))
    with pytest.raises(RuntimeError, match="a label is not in the vocabulary"):
        head(hidden, torch.tensor([[-100, wrong]]))
