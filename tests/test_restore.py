"""A run that goes back to a checkpoint without a new process: weights, moments and working weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from layouts import Layout, micro_batches
from resumed_runs import run_of, with_tokenizer

from opt_parallel.config.run import Run


def go_back(run: Run, saved_at: int) -> tuple[list[float], list[float]]:
    """On the crew: losses of the steps after `saved_at`, at first and after going back there; with it the loss that
    follows each of the two without a step, of the working weights alone."""
    from deepspeed.accelerator import get_accelerator

    from opt_parallel.checkpoint.store import Store
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.clock import Clock

    get_accelerator().is_fp16_supported = lambda: True  # as in layouts.train
    with Topology.open(run.parallel.tensor) as topology:
        store = Store(run, topology, run.folder / "tokenizer")
        engine, clock = Engine.build(run, topology, random_source(run.seed)), Clock()
        place = (topology.data.rank, topology.data.size)

        def losses(clock: Clock) -> list[float]:
            found = [float(engine.evaluate(micro_batches(run, 0, *place)[0]))]
            for _ in range(2):
                result = engine.step(micro_batches(run, clock.step, *place), clock)
                clock = clock.after(run.global_batch, result.tokens)
                found.append(float(result.loss))
            return found

        for _ in range(saved_at):
            result = engine.step(micro_batches(run, clock.step, *place), clock)
            clock = clock.after(run.global_batch, result.tokens)
        store.save(engine, clock)
        store.wait()
        first = losses(clock)
        reader = store.find()
        assert reader is not None
        store.restore(engine, reader)
        again = losses(reader.clock)
        store.finish()
        engine.close()
    return first, again


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, 1, 0, 4), Layout(2, 1, 1, 4, precision="bf16"), Layout(1, 2, 3, 2, precision="bf16"),
        Layout(1, 2, 2, 2, precision="fp16", offload=True),
        pytest.param(Layout(1, 2, 1, precision="bf16"), marks=pytest.mark.long),
        pytest.param(Layout(2, 1, 2, 2, precision="bf16"), marks=pytest.mark.long),
        pytest.param(Layout(2, 2, 3, 2, precision="bf16"), marks=pytest.mark.long),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("saved_at", [pytest.param(0, marks=pytest.mark.long), 2])
def test_going_back_in_mid_run_is_the_same_run(crew: Any, tmp_path: Path, layout: Layout, saved_at: int) -> None:
    run = run_of(with_tokenizer(tmp_path / "run"), layout, 8, layout.precision)
    threshold = 10**6 if saved_at else 0  # parameters that stay gathered, and none
    run = dataclasses.replace(run, zero=dataclasses.replace(run.zero, persistence_threshold=threshold))
    for first, again in crew(layout.world)(go_back, run, saved_at):
        assert again == first
        assert first[1] != first[2]
