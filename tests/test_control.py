"""What the ranks exchange in each step beside the collectives of the model, its gradients and its loss."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from command import write_text
from stores import counting_rows, feed_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opt_parallel.data.samples.batches import Ahead, Loader, Totals
from opt_parallel.parallel.topology import Topology
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import INTERRUPTED, STOPPED, Unread


class Integers(TorchDispatchMode):
    """Counts the collectives of this thread that carry integers, which no part of the model does."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.number += any(not tensor.is_floating_point() for tensor in tensors)
        return function(*args, **kwargs or {})


def counted(folder: Path, steps: int) -> int:
    """On the crew: the number of such collectives in a run."""
    from layouts import Layout, run_for

    from opt_parallel.config.output import LoggingConfig, Wandb
    from opt_parallel.config.run import DataConfig, RunConfig
    from opt_parallel.loop import train

    run = dataclasses.replace(
        run_for(Layout(data=2, stage=1, micro=4), {"vocab_size": 301, "num_hidden_layers": 1}, steps=steps),
        data=DataConfig(train=str(folder / "text.jsonl"), sequence_length=16, cache=str(folder / "cache")),
        logging=LoggingConfig(wandb=Wandb.disabled, tensorboard=False),
        run=RunConfig("counted", str(folder / f"run-{steps}")),
    )
    with contextlib.redirect_stdout(io.StringIO()), Integers() as integers:
        assert train(run) == 0
    return integers.number


def test_a_step_takes_one_exchange(crew: Any, tmp_path: Path) -> None:
    write_text(tmp_path)
    short, long = crew(2)(counted, tmp_path, 2), crew(2)(counted, tmp_path, 3)
    assert [there - here for here, there in zip(short, long, strict=True)] == [1, 1]


def ahead(folder: Path, statuses: list[list[int]], damaged: bool) -> list[Any]:
    """On the crew: three steps' batches, numbers and status, where the ranks are asked to stop by `statuses`."""
    with Topology.open(2) as topology:
        rows = counting_rows(folder / str(topology.world.rank), 16, 4)
        if damaged and topology.world.rank == 2:
            (folder / "2" / "part-00002" / "ids.bin").write_bytes(b"")
        feed = feed_of(rows, 7, 4, 1, topology.data.rank, topology.data.size)
        own = iter(statuses[topology.world.rank])
        seen: list[Any] = []
        try:
            steps = Ahead(Loader(feed, Clock(), 3, topology.device), topology, lambda: next(own))
            for step in range(3):
                batches, totals = steps.take(last=step == 2)
                seen.append(
                    (sorted(int(number) for each in batches for number in each.samples), totals, steps.status())
                )
        except Unread as error:
            seen.append(str(error))
        return seen


def test_all_ranks_learn_the_same(crew: Any, tmp_path: Path) -> None:
    """Two ranks are asked to stop, with different statuses, one of them before the second exchange."""
    asked = [[0, 0, 0], [0, STOPPED, STOPPED], [0, 0, INTERRUPTED], [0, 0, 0]]
    counts = Totals(16, 16)
    for rank, seen in enumerate(crew(4)(ahead, tmp_path, asked, damaged=False)):
        data = rank // 2
        assert [step[0] for step in seen] == [[4 * step + data, 4 * step + data + 2] for step in range(3)]
        assert [step[1:] for step in seen] == [(counts, STOPPED), (counts, INTERRUPTED), (counts, INTERRUPTED)]


def test_text_that_one_rank_cannot_read_ends_the_same_step_of_all(crew: Any, tmp_path: Path) -> None:
    seen = crew(4)(ahead, tmp_path, [[0] * 3] * 4, damaged=True)
    assert len({(len(steps), steps[-1]) for steps in seen}) == 1
    assert "ids.bin ends early" in seen[0][-1]


@pytest.mark.parametrize("asked", [0, STOPPED])
def test_a_process_without_others_learns_of_a_request_at_once(asked: int, tmp_path: Path) -> None:
    with Topology.open(1) as topology:
        status = 0
        steps = Ahead(Loader(feed_of(counting_rows(tmp_path, 9, 4), 7, 1, 1), Clock(), 9, topology.device), topology,
                      lambda: status)  # fmt: skip
        status = asked
        assert steps.status() == asked
