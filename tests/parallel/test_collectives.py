"""The four collectives: their values, their gradients, and that they communicate no more than they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opt_parallel.parallel import collectives


def inputs(rank: int) -> Tensor:
    return torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def apply(name: str, size: int) -> tuple[Tensor, Tensor]:
    from opt_parallel.parallel.topology import Topology

    with Topology.open(size) as topology:
        tensor = inputs(topology.tensor.rank)
        output = getattr(collectives, name)(tensor, topology.tensor)
        upstream = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
        output.backward(upstream if name != "copy" else upstream * (topology.tensor.rank + 1))
        assert tensor.grad is not None
        return output.detach(), tensor.grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_forward_and_backward(crew: Any, size: int) -> None:
    tensors = [inputs(rank).detach() for rank in range(size)]
    draw = torch.Generator

    def upstream(shape: torch.Size) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw().manual_seed(99))

    total = torch.stack(tensors).sum(0)
    for rank, (output, gradient) in enumerate(crew(size)(apply, "copy", size)):
        torch.testing.assert_close(output, tensors[rank])
        torch.testing.assert_close(gradient, upstream(output.shape) * sum(range(1, size + 1)))
    for output, gradient in crew(size)(apply, "reduce", size):
        torch.testing.assert_close(output, total)
        torch.testing.assert_close(gradient, upstream(output.shape))
    for rank, (output, gradient) in enumerate(crew(size)(apply, "gather", size)):
        torch.testing.assert_close(output, torch.cat(tensors, dim=-1))
        torch.testing.assert_close(gradient, upstream(output.shape).chunk(size, dim=-1)[rank])
    for rank, (output, gradient) in enumerate(crew(size)(apply, "scatter", size)):
        torch.testing.assert_close(output, tensors[rank].chunk(size, dim=-1)[rank])
        torch.testing.assert_close(gradient, torch.cat([upstream(output.shape)] * size, dim=-1))


def compiled_gradient(size: int) -> tuple[Tensor, Tensor]:
    from opt_parallel.parallel.topology import Topology

    with Topology.open(size) as topology:

        def both(tensor: Tensor) -> Tensor:
            return collectives.reduce(collectives.copy(tensor, topology.tensor).sin(), topology.tensor)

        plain, compiled = inputs(0), inputs(0)
        both(plain).sum().backward()
        torch.compile(both, fullgraph=True, backend="aot_eager")(compiled).sum().backward()
        assert plain.grad is not None
        assert compiled.grad is not None
        return plain.grad, compiled.grad


def test_gradients_survive_compilation(crew: Any) -> None:
    for plain, compiled in crew(2)(compiled_gradient, 2):
        torch.testing.assert_close(compiled, plain)


def counted(size: int) -> dict[str, int]:
    """Collectives of one decoder block, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from opt_parallel.config.model import ModelConfig
    from opt_parallel.model.opt import Block, Context
    from opt_parallel.parallel.shard import fill, random_source
    from opt_parallel.parallel.topology import Topology

    counts: dict[str, int] = {"forward": 0, "backward": 0}

    class Count(TorchDispatchMode):
        phase = "forward"

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[self.phase] += function.namespace in ("c10d", "_c10d_functional")
            return function(*args, **(kwargs or {}))

    with Topology.open(size) as topology:
        with torch.device("meta"):
            block = Block(ModelConfig(hidden_size=16, num_attention_heads=4, ffn_dim=32), 0, topology.tensor)
        fill(block, random_source(1), torch.device("cpu"), torch.float32)
        hidden = torch.randn(2, 4, 16, requires_grad=True)
        with Count() as mode:
            output = block(hidden, Context()).sum()
            mode.phase = "backward"
            output.backward()
    return counts


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 2)])
def test_a_block_communicates_twice_each_way(crew: Any, size: int, expected: int) -> None:
    assert crew(size)(counted, size) == [{"forward": expected, "backward": expected}] * size


def told_by_the_first(size: int) -> list[list[int]]:
    from opt_parallel.parallel.topology import Topology

    with Topology.open(size) as topology:
        mine = torch.full((3,), topology.world.rank)
        told = [collectives.broadcast(mine, group).tolist() for group in (topology.tensor, topology.data)]
        assert mine.tolist() == [topology.world.rank] * 3  # nobody's argument changes
        return told


def test_broadcast_is_from_each_groups_first_rank(crew: Any) -> None:
    for rank, (in_row, in_column) in enumerate(crew(4)(told_by_the_first, 2)):
        assert in_row == [rank // 2 * 2] * 3
        assert in_column == [rank % 2] * 3
