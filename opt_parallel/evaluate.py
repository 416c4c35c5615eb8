"""The loss on text that the run does not train on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from opt_parallel.data.batches import Batch
from opt_parallel.engine import Engine
from opt_parallel.parallel.collectives import all_reduce


def validation_loss(engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean loss, in nats a token, over all data ranks' batches: one mean over the targets, not a mean of means.

    Every data rank must bring the same number of batches, since ZeRO-3 gathers weights in each forward."""
    topology = engine.topology
    total, targets = torch.zeros((), device=topology.device, dtype=torch.float64), 0
    for batch in batches:
        total += engine.evaluate(batch)
        targets += batch.targets
    return float(all_reduce(total, topology.data)) / topology.sum(targets, topology.data)
