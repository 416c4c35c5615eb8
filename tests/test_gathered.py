"""ZeRO-3 holds the gathered weights of at most two blocks at any moment of a step."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any
from unittest import mock

import pytest
from layouts import Layout, micro_batches, run_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from opt_parallel.config.run import ActivationCheckpointing, Run
from opt_parallel.model.opt import Block
from opt_parallel.runtime.clock import Clock


class Gathered(TorchDispatchMode):
    """Looks, at each operator, at the blocks of which a gathered matrix exists, as the parameter or as a view of it.

    `most` is the largest number of elements of such weights so far."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        matrices = [each for block in blocks for each in block.parameters() if len(each.ds_shape) > 1]
        self.parameters = [(each, each.ds_numel) for each in matrices]
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for parameter, full in self.parameters:
            if parameter.numel() == full:
                storage = parameter.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = full
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return result


def most_gathered(run: Run, with_views: bool = False) -> list[float]:
    """On the crew: the largest number of gathered blocks in each step."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel import linear
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology

    found = []
    product = saving_a_view if with_views else linear.column_product
    with mock.patch.object(linear, "column_product", product), Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        for step in range(2):  # DeepSpeed prefetches in the second step
            with Gathered(engine.wrapped.module) as watching:
                engine.step(micro_batches(run, step, topology.data.rank, topology.data.size), Clock(step))
            block = sum(full for _, full in watching.parameters) / run.model.num_hidden_layers
            found.append(watching.most / block)
        engine.close()
    return found


def saving_a_view(hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
    """The product of a column-parallel layer as torch saves it for the backward: with a view of the weight."""
    return F.linear(hidden, weight.view(-1, weight.size(-1)), bias.view(-1))


def run_of(recompute: ActivationCheckpointing) -> Run:
    run = run_for(Layout(data=2, stage=3, micro=2), {"num_hidden_layers": 5, "layerdrop": 0.0}, batch=4)
    return dataclasses.replace(run, activation_checkpointing=recompute)


KINDS = [
    pytest.param(kind, marks=[] if kind is ActivationCheckpointing.full else pytest.mark.long)
    for kind in ActivationCheckpointing
]


@pytest.mark.parametrize("recompute", KINDS, ids=lambda kind: kind.value)
def test_at_most_two_blocks_are_gathered(crew: Any, recompute: ActivationCheckpointing) -> None:
    for found in crew(2)(most_gathered, run_of(recompute)):
        assert max(found) <= 2, found


def test_a_saved_view_of_a_weight_is_found(crew: Any) -> None:
    for found in crew(2)(most_gathered, run_of(ActivationCheckpointing.none), with_views=True):
        assert min(found) > 3, found
