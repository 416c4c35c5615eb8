"""A run saved in one layout goes on in any other: the losses are the straight run's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from layouts import Layout, micro_batches, run_for

HALF, WHOLE = 3, 6
LAYOUTS = {
    "t1d1z0": Layout(),
    "t1d2z1": Layout(data=2, stage=1),
    "t2d1z2": Layout(tensor=2, stage=2),
    "t2d2z3": Layout(tensor=2, data=2, stage=3),
    "t1d4z3": Layout(data=4, stage=3),
    "t4d1z1": Layout(tensor=4, stage=1),
    "t2d2z1-offload": Layout(tensor=2, data=2, stage=1, offload=True),
    "t1d2z2m2": Layout(data=2, stage=2, micro=2),
}


def go(
    folder: str, layout: Layout, steps: int, first: int, last: int, model: dict[str, Any], pretend_fp16: bool = False
) -> tuple[list[float], float | None]:
    """On the crew: steps `first` to `last` of a run of `steps`, resumed from and saved to `folder`; the losses, and the
    fp16 loss scale at the end."""
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.clock import Clock
    from opt_parallel.config import RunConfig
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.topology import Topology

    if pretend_fp16:  # as in layouts.train
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    run = dataclasses.replace(run_for(layout, model, steps), run=RunConfig("test", folder))
    with Topology.open(layout.tensor) as topology:
        store = Store(run, topology, Path(folder) / "tokenizer")
        checkpoint = store.find()
        engine = Engine.build(run, topology, checkpoint or random_source(run.seed))
        clock = store.restore(engine, checkpoint) if checkpoint else Clock()
        assert clock.step == first
        losses = []
        while clock.step < last:
            result = engine.step(micro_batches(run, clock.step, topology.data.rank, topology.data.size), clock.step)
            clock = clock.after(run.global_batch, result.targets)
            losses.append(float(result.loss))
        if last < steps:
            store.save(engine, clock)
        store.finish()
        scale = None if engine.scaler is None else engine.scaler.scale
        engine.close()
    return losses, scale


def folder_with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def halves(
    crew: Any, tmp_path: Path, before: Layout, after: Layout, model: dict[str, Any], **named: Any
) -> list[float]:
    """The losses of a run that changes its layout half-way; every rank must agree."""
    folder = str(folder_with_tokenizer(tmp_path / f"{before}-{after}"))
    losses = []
    for layout, first, last in ((before, 0, HALF), (after, HALF, WHOLE)):
        answers = [each for each, _ in crew(layout.world)(go, folder, layout, WHOLE, first, last, model, **named)]
        assert all(each == answers[0] for each in answers)
        losses += answers[0]
    return losses


def straight(crew: Any, tmp_path: Path, layout: Layout, model: dict[str, Any], **named: Any) -> list[float]:
    folder = str(folder_with_tokenizer(tmp_path / f"straight-{layout}"))
    return crew(layout.world)(go, folder, layout, WHOLE, 0, WHOLE, model, **named)[0][0]


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_any_layout_continues_any_other(crew: Any, tmp_path: Path, before: str, after: str) -> None:
    wanted = straight(crew, tmp_path, LAYOUTS[before], {})
    got = halves(crew, tmp_path, LAYOUTS[before], LAYOUTS[after], {})
    assert got == pytest.approx(wanted, rel=1e-5)  # float32, sums in another order
