"""The planned memory beside the bytes of live tensors in a real step on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from layouts import Layout, micro_batches, run_for

from opt_parallel.config.run import Run
from opt_parallel.planning.cluster import DEVICES, Cluster
from opt_parallel.planning.memory import memory
from opt_parallel.planning.workload import of_run
from opt_parallel.runtime.clock import Clock

# Weights and activations both count, and small tensors do not. Eager dropout would make temporary tensors, which a
# compiled one does not.
WIDE = {
    "hidden_size": 256,
    "ffn_dim": 1024,
    "vocab_size": 2048,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "layerdrop": 0.0,
}


def run_of(layout: Layout, batch: int, layers: int) -> Run:
    run = run_for(layout, {**WIDE, "num_hidden_layers": layers}, batch=batch)
    zero = dataclasses.replace(run.zero, reduce_bucket_size=200_000, prefetch_bucket_size=100_000)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=128), zero=zero)


def live_peak(run: Run) -> tuple[int, str]:
    """On the crew: the largest number of bytes of live tensors in the second step, and the operator after which they
    live."""
    from opt_parallel.benchmarks.live import Live
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology

    with Topology.open(run.parallel.tensor) as topology:
        before = Live().now
        engine = Engine.build(run, topology, random_source(run.seed))
        batches = [micro_batches(run, step, topology.data.rank, topology.data.size) for step in range(2)]
        with Live().compiling():  # nothing is really compiled
            engine.step(batches[0], Clock(0))
        with Live() as live, live.compiling():
            engine.step(batches[1], Clock(1))
        engine.close()
    return live.trace.peak - before, live.trace.at


def check(crew: Any, layout: Layout, layers: int = 4, tolerance: float = 0.03) -> None:
    run = run_of(layout, 8 * layout.data, layers)
    workload = dataclasses.replace(of_run(run, layout.world), cpu=True)
    planned = memory(workload, Cluster(DEVICES["h100-80gb"])).allocated
    for peak, at in crew(layout.world)(live_peak, run):
        assert planned == pytest.approx(peak, rel=tolerance), at


def test_the_plan_is_what_lives(crew: Any) -> None:
    check(crew, Layout(1, 2, 2, 4), layers=2, tolerance=0.005)


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_plan_of_each_stage_is_what_lives(crew: Any, stage: int, tensor: int, recompute: str) -> None:
    micro = 8 if tensor == 4 else 4  # so that the loss of a rank's words is large enough to be compiled
    check(crew, Layout(tensor, 4 // tensor, stage, micro, recompute))
