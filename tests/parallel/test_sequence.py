"""Sequence parallelism: parts of the positions compute what all positions do, with few collectives and less memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.parallel import sequence
from opt_parallel.parallel.products import part_product
from opt_parallel.parallel.sequence import Split
from opt_parallel.parallel.topology import Group

WIDTH = 6
LENGTHS = [8, 9, 1]  # with 4 ranks: no padding; padding on the last two ranks; three ranks of padding only


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", LENGTHS)
def test_parts_are_the_whole_and_zeros(length: int) -> None:
    whole = random(1, 2, length, WIDTH)
    splits = [Split(Group(None, rank, 4), length) for rank in range(4)]
    joined = torch.cat([split.part(whole) for split in splits], dim=1)
    assert torch.equal(joined[:, :length], whole)
    assert not joined[:, length:].any()
    assert [split.first for split in splits] == [rank * splits[0].size for rank in range(4)]
    assert torch.equal(torch.cat([split.part(whole[..., 0]) for split in splits], dim=1), joined[..., 0])


def in_parts(size: int, length: int) -> dict[str, tuple[Tensor, ...]]:
    """On the crew: the result of each function on this rank's part, and its gradients."""
    from opt_parallel.parallel.topology import Topology

    with Topology.open(size) as topology:
        group = topology.tensor
        split, rank = Split(group, length), group.rank
        part = split.part(random(1, 2, length, WIDTH)).clone().requires_grad_()
        own = random(10 + rank, 2, length, WIDTH).requires_grad_()
        weight, bias, matrix = (random(n, *shape).requires_grad_() for n, shape in PARAMETERS)
        results = {
            "gather": (sequence.gather(part, split), (part,), random(20 + rank, 2, length, WIDTH)),
            "gather for all": (sequence.gather_for_all(part, split), (part,), random(30, 2, length, WIDTH)),
            "reduce scatter": (sequence.reduce_scatter(own, split), (own,), split.part(random(30, 2, length, WIDTH))),
            "layer norm": (
                sequence.layer_norm_of_part(part, weight, bias, 1e-5, group), (part, weight, bias),
                split.part(random(30, 2, length, WIDTH)),
            ),
            "product": (
                part_product(part, matrix, group), (part, matrix), split.part(random(31, 2, length, 4)),
            ),
        }  # fmt: skip
        return {
            name: (output.detach(), *torch.autograd.grad(output, inputs, upstream))
            for name, (output, inputs, upstream) in results.items()
        }


PARAMETERS = ((2, (WIDTH,)), (3, (WIDTH,)), (4, (2, 2, WIDTH)))


@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients(crew: Any, length: int) -> None:
    size, exact = 4, {"rtol": 1e-12, "atol": 1e-12}  # float64, sums in another order
    whole = random(1, 2, length, WIDTH).requires_grad_()
    weight, bias, matrix = (random(n, *shape).requires_grad_() for n, shape in PARAMETERS)
    upstream = random(30, 2, length, WIDTH)
    normed = F.layer_norm(whole, (WIDTH,), weight, bias, 1e-5)
    product = F.linear(whole, matrix.flatten(0, -2))
    by_norm = torch.autograd.grad(normed, (whole, weight, bias), upstream)
    by_product = torch.autograd.grad(product, (whole, matrix), random(31, 2, length, 4))
    summed = torch.stack([random(10 + rank, 2, length, WIDTH) for rank in range(size)]).sum(0)
    for rank, found in enumerate(crew(size)(in_parts, size, length)):
        split = Split(Group(None, rank, size), length)
        real = slice(0, max(0, min(split.size, length - split.first)))
        upstreams = torch.stack([random(20 + other, 2, length, WIDTH) for other in range(size)]).sum(0)
        expected = {
            "gather": (whole, split.part(upstreams)),
            "gather for all": (whole, split.part(upstream)),
            "reduce scatter": (split.part(summed), upstream),
            "layer norm": (split.part(normed), split.part(by_norm[0]), *by_norm[1:]),
            "product": (split.part(product), split.part(by_product[0]), by_product[1]),
        }
        for name, tensors in expected.items():
            of_padding = name in ("layer norm", "product")  # what these make of padding is never read
            for which, (got, wanted) in enumerate(zip(found[name], tensors, strict=True)):
                read = (slice(None), real) if of_padding and which == 0 else ()
                torch.testing.assert_close(got[read], wanted.detach()[read], **exact)


def block_of(size: int, split: bool) -> tuple[dict[str, Counter[str]], int]:
    """On the crew: the collectives of one decoder block's forward and backward, and the bytes of activations that it
    saves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from opt_parallel.config.model import ModelConfig
    from opt_parallel.model.opt import Block, Context
    from opt_parallel.parallel.shard import fill, random_source
    from opt_parallel.parallel.topology import Topology

    counts: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    saved: dict[int, Tensor] = {}

    class Count(TorchDispatchMode):
        phase = "forward"

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "c10d":
                counts[self.phase][function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with Topology.open(size) as topology:
        with torch.device("meta"):
            block = Block(ModelConfig(hidden_size=16, num_attention_heads=4, ffn_dim=32), 0, topology.tensor)
        fill(block, random_source(1), torch.device("cpu"), torch.float32)
        length = 64 // size if split else 64
        hidden = torch.randn(2, length, 16, requires_grad=True)
        context = Context(split=Split(topology.tensor, 64)) if split else Context()
        with Count() as mode, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = block(hidden, context).sum()
            mode.phase = "backward"
            output.backward()
        weights = {tensor.untyped_storage()._cdata for tensor in block.parameters()}
        held = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)
    return counts, held


def test_a_block_replaces_its_collectives_and_saves_parts(crew: Any) -> None:
    """The bias of a row-parallel layer needs no collective: the gradient of all positions is gathered anyway."""
    (whole, all_bytes), (parts, bytes_of_parts) = crew(2)(block_of, 2, False)[0], crew(2)(block_of, 2, True)[0]
    assert whole == {"forward": {"allreduce_": 2}, "backward": {"allreduce_": 2}}
    assert parts == {
        # Without a GPU, an all-gather is two broadcasts, and a reduce-scatter is an all-to-all.
        "forward": {"broadcast_": 2 * 2, "alltoall_base_": 2},
        # the inputs of the two column-parallel layers, the gradients of the two row-parallel layers; the LayerNorms
        "backward": {"broadcast_": 4 * 2, "alltoall_base_": 2, "allreduce_": 2},
    }
    # Of 2 × 64 tokens in fp32: the inputs and outputs of the LayerNorms, 4 × 16 numbers and 4 of statistics, of which
    # half is left. Query, key, value and what follows are as before.
    assert all_bytes - bytes_of_parts == 2 * 64 * 4 * (4 * 16 + 4) // 2
