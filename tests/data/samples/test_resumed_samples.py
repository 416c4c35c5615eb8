"""The samples after a resume are the straight run's, whatever the ranks and the batch are now."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from layouts import Layout, run_for
from resumed_runs import with_tokenizer
from stores import counting_rows, feed_of

from opt_parallel.config.run import Run, RunConfig

ROWS, LENGTH = 21, 16  # an epoch ends within the run's steps, and within a batch


def seen(run: Run, folder: str, last: int) -> list[list[tuple[int, int]]]:
    """On the crew: the run from its newest checkpoint or from the start to step `last`, and saved. Of each step the
    samples that this data rank had, by their ordinals in the run and their rows in the store."""
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.data.samples.samples import Rows
    from opt_parallel.data.store.store import TokenStore
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.clock import Clock
    from opt_parallel.start import build_engine

    with Topology.open(run.parallel.tensor) as topology:
        store = Store(run, topology, run.folder / "tokenizer")
        checkpoint = store.find()
        engine = build_engine(run, topology, store, checkpoint)
        clock = checkpoint.clock if checkpoint else Clock()
        rows, place = Rows(TokenStore(folder), LENGTH), (topology.data.rank, topology.data.size)
        feed = feed_of(rows, run.seed, run.global_batch, run.micro_batch, *place)
        steps = []
        while clock.step < last:
            batches = feed.at(clock.samples)
            result = engine.step(batches, clock)
            clock = clock.after(run.global_batch, result.tokens)
            pairs = [
                zip(batch.samples.tolist(), (batch.ids[:, 0] // LENGTH).tolist(), strict=True) for batch in batches
            ]
            steps.append([pair for each in pairs for pair in each])
        store.save(engine, clock)
        store.finish()
        engine.close()
    return steps


def together(crew: Any, size: int, run: Run, folder: str, last: int) -> list[tuple[int, int]]:
    """The samples of all `size` ranks in the order of the run; a data rank's tensor ranks must have had the same."""
    tensor = run.parallel.tensor
    answers = crew(size)(seen, run, folder, last)
    assert all(answer == answers[rank - rank % tensor] for rank, answer in enumerate(answers))
    steps = zip(*answers[::tensor], strict=True)
    found = [sorted(pair for share in step for pair in share) for step in steps]
    assert all(len(step) == run.global_batch for step in found)
    return [pair for step in found for pair in step]


def test_the_ids_of_the_samples(crew: Any, tmp_path: Path) -> None:
    """On one rank with batches of 6; then data 2 with 4, then tensor 2 with 9: 57 samples, of almost three epochs."""
    blocks = str(counting_rows(tmp_path / "store", ROWS, LENGTH).store.folder)
    model = {"num_hidden_layers": 1}

    def run_of(name: str, layout: Layout, batch: int) -> Run:
        base = run_for(layout, model, steps=12)
        return dataclasses.replace(
            base, run=RunConfig("test", str(tmp_path / name)), batch={"global": batch, "micro": layout.micro}
        )

    for name in ("straight", "changed"):
        with_tokenizer(tmp_path / name)
    alone = Layout(micro=3)
    straight = together(crew, 1, run_of("straight", alone, 6), blocks, 10)
    assert [ordinal for ordinal, _ in straight] == list(range(60))
    for epoch in range(2):
        rows = [row for _, row in straight[epoch * ROWS : (epoch + 1) * ROWS]]
        assert sorted(rows) == list(range(ROWS))
        assert rows != sorted(rows)
    changed = together(crew, 1, run_of("changed", alone, 6), blocks, 3)  # 18 samples: the epoch ends in the next batch
    changed += together(crew, 2, run_of("changed", Layout(data=2, stage=2, micro=1), 4), blocks, 6)
    changed += together(crew, 2, run_of("changed", Layout(tensor=2, stage=1, micro=3), 9), blocks, 9)
    assert changed == straight[:57]
