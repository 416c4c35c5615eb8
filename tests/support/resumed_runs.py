"""A small run that is saved and resumed on the worker processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from layouts import Layout, micro_batches, run_for, weights_of

from opt_parallel.config.run import PrecisionConfig, Run, RunConfig


def run_of(
    folder: Path,
    layout: Layout,
    steps: int,
    precision: str = "fp32",
    model: dict[str, Any] | None = None,
    scale: float = 16.0,
) -> Run:
    """The small run in `layout`, with its files in `folder`. The loss scale of fp16 starts at `scale` and doubles after
    two steps without overflow."""
    shape = {"dropout": 0.1, "num_hidden_layers": 2, **(model or {})}
    run = run_for(dataclasses.replace(layout, precision=precision), shape, steps, batch=4)
    scaler = PrecisionConfig(run.precision.name, initial_scale=scale, window=2)
    return dataclasses.replace(run, run=RunConfig("test", str(folder)), precision=scaler)


def go(run: Run, first: int, last: int, saves: tuple[int, ...] = ()) -> dict[str, Any]:
    """Run steps `first` to `last` on a worker process, from the newest checkpoint or from the start. Save after the
    steps in `saves`.

    Returns the losses, the steps that fp16 skipped, the number of updates and the state of the loss scale at the end,
    and this rank's weights at the last save."""
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.clock import Clock
    from opt_parallel.start import build_engine

    losses, skipped, weights = [], [], {}
    with Topology.open(run.parallel.tensor) as topology:
        store = Store(run, topology, run.folder / "tokenizer")
        checkpoint = store.find()
        engine = build_engine(run, topology, store, checkpoint)
        clock = checkpoint.clock if checkpoint else Clock()
        assert clock.step == first
        while True:
            if clock.step in saves:
                store.save(engine, clock)
                weights = weights_of(engine)
            if clock.step == last:
                break
            result = engine.step(micro_batches(run, clock.step, topology.data.rank, topology.data.size), clock)
            clock = clock.after(run.global_batch, result.tokens)
            losses.append(float(result.loss))
            skipped.append(result.skipped)
        store.finish()
        scale = None if engine.scaler is None else engine.scaler.state()
        ended = {"losses": losses, "skipped": skipped, "updates": engine.updates, "scale": scale, "weights": weights}
        engine.close()
    return ended


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder
