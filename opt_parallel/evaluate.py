"""The loss on text that the run does not train on."""

from __future__ import annotations

from pathlib import Path

import torch

from opt_parallel.data.batches import validation_batches
from opt_parallel.engine import Engine
from opt_parallel.parallel.collectives import all_reduce


def validation_loss(engine: Engine, blocks: Path) -> float:
    """Mean loss of all `blocks`, in nats a token: one mean over the targets of all data ranks, not a mean of means."""
    topology = engine.topology
    total, targets = torch.zeros((), device=topology.device, dtype=torch.float64), 0
    for batch in validation_batches(blocks, engine.run.micro_batch, topology.data.rank, topology.data.size):
        total += engine.evaluate(batch)
        targets += batch.targets
    return float(all_reduce(total, topology.data)) / topology.sum(targets, topology.data)
