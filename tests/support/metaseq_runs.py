"""Trains from a checkpoint on the pool of worker processes, and measures what a rank reads and holds."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch
from layouts import Layout, micro_batches, run_for

from opt_parallel.config.run import Run
from opt_parallel.config.task import LoraConfig, TaskConfig
from opt_parallel.runtime.clock import Clock


def run_from(folder: Path, layout: Layout, rank: int = 0, steps: int = 2) -> Run:
    """A run of `steps` steps from the checkpoint in `folder`, with LoRA of this rank if it is not 0."""
    from opt_parallel.checkpoint.inherit import model_at

    return dataclasses.replace(
        run_for(layout, steps=steps, batch=4),
        model=dataclasses.replace(model_at(folder, ""), attention_dropout=0.0),
        task=TaskConfig(lora=LoraConfig(rank)),
        init_from=str(folder),
    )


def fp32_tensors() -> list[torch.Tensor]:
    """The fp32 tensors of this process, without a compiler's fake tensors."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [each for each in gc.get_objects() if type(each) in kinds and each.dtype is torch.float32]


def train_from(run: Run) -> dict[str, Any]:
    """Train on each worker process. Return the losses, and facts about the frozen weights: their dtypes, their number
    of elements on this rank and that of the smallest matrix, how many of them have a gradient, and the number of
    elements of the largest fp32 storage that the run has made."""
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.start import weights

    earlier = fp32_tensors()  # of other tests in this process; kept, so that no other tensor gets one's id
    known = set(map(id, earlier))
    start = open_checkpoint(str(run.init_from)).grown(run.model.vocab_size)
    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, weights(run.seed, start, None))
        steps = [
            engine.step(micro_batches(run, step, topology.data.rank, topology.data.size), Clock(step))
            for step in range(run.steps)
        ]
        named = engine.wrapped.module.named_parameters()
        base = {name: tensor for name, tensor in named if not tensor.requires_grad}
        frozen = list(base.values())
        matrices = [tensor.numel() for name, tensor in base.items() if name.endswith("weight") and tensor.dim() > 1]
        held = [each for each in fp32_tensors() if id(each) not in known]
        found = {
            "losses": [float(step.loss) for step in steps],
            "read": start.metaseq.bytes_read if start.metaseq else 0,
            "dtypes": {tensor.dtype for tensor in frozen},
            "frozen": sum(tensor.numel() for tensor in frozen),
            "smallest": min(matrices, default=0),
            "gradients": sum(tensor.grad is not None for tensor in frozen),
            "fp32": max(each.untyped_storage().nbytes() // 4 for each in held),
        }
        engine.close()
    return found
