"""Runs with bf16 moments and without fp32 weights: the same bits in every layout, saved and resumed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from layouts import Layout, assemble, in_bf16, run_for, train
from resumed_runs import go, run_of, with_tokenizer

from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.config.run import Run

SMALL = {"num_hidden_layers": 2}  # so that no rounding is compiled, which would take longer than the tests
ALONE = Layout(1, 1, 1, 4)
ON_TWO = [Layout(1, 2, stage, 4) for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def alone(crew: Any) -> Any:
    return crew(1)(train, in_bf16(run_for(ALONE, SMALL, 3)))[0]


@pytest.mark.parametrize("layout", ON_TWO, ids=str)
def test_stages_and_data_ranks_give_the_same_bits(crew: Any, alone: Any, layout: Layout) -> None:
    """Two micro-batches of four samples, on one process or on two. Their gradients are added in fp32 in both cases."""
    ranks = crew(2)(train, in_bf16(run_for(layout, SMALL, 3)))
    wanted = assemble([alone[2]])
    for losses, _, _ in ranks:
        assert losses == alone[0]
    for name, values in assemble([weights for _, _, weights in ranks]).items():
        assert torch.equal(values, wanted[name]), name


def test_tensor_ranks_follow(crew: Any, alone: Any) -> None:
    """Products are summed in another order, in bf16, so that some elements are rounded to the other neighbour."""
    ranks = crew(2)(train, in_bf16(run_for(Layout(2, 1, 1, 4), SMALL, 3)))
    assert ranks[0][0] == pytest.approx(alone[0], abs=0.02)


def state_of(run: Run) -> dict[str, dict[str, Any]]:
    """On the crew: this process's weights and moments, and their dtype, after the newest checkpoint is restored."""
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.start import build_engine

    with Topology.open(run.parallel.tensor) as topology:
        store = Store(run, topology, run.folder / "tokenizer")
        engine = build_engine(run, topology, store, store.find())
        state = {each.name: {kind: values.clone() for kind, values in each.tensors.items()} for each in engine.owned()}
        store.finish()
        engine.close()
    return state


@pytest.fixture(scope="module")
def saved(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with bf16 state on two ranks of ZeRO-3, saved after the second of four steps, so that a later loss depends
    on the restored moments; and one with fp32 state."""
    runs = {}
    for name, last in (("bf16", 4), ("fp32", 2)):
        folder = with_tokenizer(tmp_path_factory.mktemp(name) / "run")
        run = run_of(folder, dataclasses.replace(ON_TWO[2], micro=2), 4, "bf16", SMALL)
        runs[name] = folder, crew(2)(go, in_bf16(run) if name == "bf16" else run, 0, last, (2,))
    return runs


@pytest.mark.parametrize("layout", [ON_TWO[2], ON_TWO[0], ALONE], ids=str)
def test_any_layout_continues_to_the_last_bit(crew: Any, saved: Any, layout: Layout) -> None:
    folder, answers = saved["bf16"]
    layout = dataclasses.replace(layout, micro=2)
    got = crew(layout.world)(go, in_bf16(run_of(folder, layout, 4, "bf16", SMALL)), 2, 4)
    assert got[0]["losses"] == answers[0]["losses"][2:]
    assert got[0]["updates"] == 4


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_dtype_continues(crew: Any, saved: Any, before: str, after: str) -> None:
    """A checkpoint has fp32 values. bf16 values are exact in fp32, and fp32 values are rounded to the nearest."""
    folder, _ = saved[before]
    run = run_of(folder, ALONE, 4, "bf16", SMALL)
    restored = crew(1)(state_of, in_bf16(run) if after == "bf16" else run)[0]
    reader = CheckpointReader(folder / "checkpoints" / "step-2")
    dtype = torch.bfloat16 if after == "bf16" else torch.float32
    rounded = 0
    for name, kinds in restored.items():
        assert set(kinds) == {"weights", "exp_avg", "exp_avg_sq"}
        for kind, values in kinds.items():
            stored = reader.read_tensor(kind, name)
            assert stored is not None
            assert values.dtype is dtype
            assert torch.equal(values.view(stored.shape), stored.to(dtype)), (kind, name)
            rounded += int((stored != stored.bfloat16().float()).sum())
    assert (rounded > 0) == (before == "fp32")
