"""A whole step of one of many ranks on fake CUDA tensors: its memory beside the plan, its collectives, its faults."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, cold_python, launch
from layouts import Layout, micro_batches, run_for
from torch import Tensor, nn

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import (
    ActivationCheckpointing,
    Offload,
    ParallelConfig,
    Precision,
    PrecisionConfig,
    Run,
    ZeroConfig,
)
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.planning.activations import activations
from opt_parallel.planning.exchange import data_bytes
from opt_parallel.planning.parameters import layer_parameters
from opt_parallel.planning.workload import of_run
from opt_parallel.runtime.clock import Clock

COMPILER = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler, for the fake CUDA device"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of torch for CPUs"),
]
LAYERS, WORLD = 2, 16


def run_of(stage: int = 1, micros: int = 1, tensor: int = 4, **changed: Any) -> Run:
    """A step of `micros` micro-batches on 16 ranks."""
    model = ModelConfig(hidden_size=2048, num_hidden_layers=LAYERS, num_attention_heads=16, ffn_dim=8192)
    base = Run(
        model=model,
        parallel=ParallelConfig(tensor=tensor),
        zero=ZeroConfig(stage=stage),
        precision=PrecisionConfig(Precision.bf16 if stage else Precision.fp32),
        data=dataclasses.replace(Run().data, sequence_length=2048),
        batch={"global": micros * WORLD // tensor, "micro": 1},
    )
    return dataclasses.replace(base, **changed)


def alone(function: str) -> Any:
    """What a function of this file prints in a new process, as JSON."""
    process = cold_python("tests/support/call.py", __file__, function)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def gathers_vocabulary(model: Any) -> None:
    """Plant: the loss gathers the rows of the vocabulary of all ranks."""
    from opt_parallel.parallel.collectives import all_gather_last

    before = model.lm_head.forward

    def forward(hidden: Tensor, labels: Tensor | None, split: Any) -> Tensor:
        weight = model.decoder.embed_tokens.weight
        whole = all_gather_last(weight.detach().T, model.decoder.group)
        loss = before(hidden, labels, split)
        return loss + whole[0, 0] * 0

    model.lm_head.forward = forward


def keeps_twice(model: Any) -> None:
    """Plant: a layer keeps its activation twice."""
    for layer in model.decoder.layers:
        layer.activation = lambda hidden: torch.relu(hidden) * torch.relu(hidden)


def on_layer(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    def damage(model: Any) -> None:
        model.decoder.layers[1].activation = change

    return damage


FAULTS: dict[str, Callable[[nn.Module], None]] = {
    "a tensor on the CPU": on_layer(lambda hidden: torch.relu(hidden * torch.ones(hidden.size(-1)))),
    "item": on_layer(lambda hidden: torch.relu(hidden) * hidden.sum().item()),
}


def results() -> dict[str, Any]:
    """In a process of its own: the steps that the tests look at."""
    from opt_parallel.rehearsal.ledger import Fault
    from opt_parallel.rehearsal.step import traced_step

    runs = {
        "ZeRO-1": run_of(),
        "ZeRO-2, three": run_of(stage=2, micros=3),
        "ZeRO-3": run_of(3, 3),
        "ZeRO-0": run_of(0, 3),
    }
    traces = {name: traced_step(run, WORLD) for name, run in runs.items()}
    traces |= {
        "vocabulary": traced_step(run_of(), WORLD, gathers_vocabulary),
        "twice": traced_step(run_of(), WORLD, keeps_twice),
    }
    faults = {}
    for name, damage in FAULTS.items():
        try:
            traced_step(run_of(), WORLD, damage)
            faults[name] = ""
        except Fault as fault:
            faults[name] = str(fault)
    steps = {name: {**dataclasses.asdict(trace), "peak": trace.peak} for name, trace in traces.items()}
    return {"steps": steps, "faults": faults, "small": traced_step(small_run(3), 2).collectives["data"]}


@pytest.fixture(scope="module")
def found(traced: Any) -> Any:
    return traced["step"]


def planned(run: Run) -> int:
    return activations(of_run(run, WORLD)).total


def test_the_step_needs_what_is_planned(found: Any) -> None:
    for name, run in {"ZeRO-1": run_of(), "ZeRO-2, three": run_of(stage=2, micros=3)}.items():
        assert found["steps"][name]["peak"] == pytest.approx(planned(run), rel=0.05), name


def test_a_step_that_keeps_more_than_planned_is_seen(found: Any) -> None:
    good = found["steps"]["ZeRO-1"]["peak"]
    for fault in ("vocabulary", "twice"):
        assert found["steps"][fault]["peak"] > 1.05 * good, fault
    gathered = found["steps"]["vocabulary"]["collectives"]["tensor"]["all-gather"][1]
    assert gathered - found["steps"]["ZeRO-1"]["collectives"]["tensor"]["all-gather"][1] >= 2 * 50272 * 2048


def test_faults_name_the_line(found: Any) -> None:
    assert "in opt_parallel/model/opt.py, line " in found["faults"]["a tensor on the CPU"]
    assert "makes the host wait for the device" in found["faults"]["item"]
    assert "in opt_parallel/model/opt.py, line " in found["faults"]["item"]


def test_gradients_are_summed_over_the_data_ranks(found: Any) -> None:
    """In fp32, in each micro-batch; the weights are gathered in bf16."""
    parameters = {}
    for name in ("ZeRO-1", "ZeRO-2, three"):
        data = found["steps"][name]["collectives"]["data"]
        parameters[name] = data["all-gather"][1] // 2
        times = 3 if name == "ZeRO-2, three" else 1
        assert data["reduce"][1] == pytest.approx(times * 4 * parameters[name], rel=1e-3), name
    assert parameters["ZeRO-1"] == parameters["ZeRO-2, three"]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("ZeRO-0", run_of(0, 3)),
        ("ZeRO-1", run_of()),
        ("ZeRO-2, three", run_of(2, 3)),
        ("ZeRO-3", run_of(3, 3)),
    ],
)
def test_the_data_group_sends_what_is_planned(found: Any, name: str, run: Run) -> None:
    """Beside the loss and the norm, an all-reduce of 12 bytes. ZeRO-3 gathers up to a layer less in each of three
    micro-batches."""
    workload = of_run(run, WORLD)
    planned, sent = data_bytes(workload), found["steps"][name]["collectives"]["data"]
    assert set(sent) == {*planned, "all-reduce"}
    for kind, expected in planned.items():
        least = expected
        if name == "ZeRO-3" and kind == "all-gather":
            least -= 3 * 2 * layer_parameters(workload.network, workload.tensor).total
        assert 0.999 * least < sent[kind][1] < 1.001 * expected, kind
    if name != "ZeRO-0":
        assert sent["all-reduce"] == [1, 12]


def small_run(stage: int) -> Run:
    """A run of two data ranks that also really runs: of four layers, without small parameters that are not split."""
    run = run_for(Layout(data=2, stage=stage, micro=2), {"num_hidden_layers": 4, "layerdrop": 0.0}, batch=8)
    return dataclasses.replace(run, zero=dataclasses.replace(run.zero, persistence_threshold=0))


def sent_in_a_real_step(run: Run) -> dict[str, tuple[int, int]]:
    """On the crew: the collectives of the data group in the second step, from which DeepSpeed knows the order of the
    modules."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.rehearsal.ledger import Ledger, Trace

    trace = Trace(run.model.num_hidden_layers)
    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        batches = [micro_batches(run, step, topology.data.rank, topology.data.size) for step in range(2)]
        engine.step(batches[0], Clock(0))
        with Ledger(trace, [], {"data": topology.data}):
            engine.step(batches[1], Clock(1))
        engine.close()
    return trace.collectives["data"]


def check_real_step(crew: Any, stage: int, rehearsed: dict[str, tuple[int, int]]) -> None:
    """DeepSpeed also keeps a few weights that it has prefetched, so it gathers a little less. A real step also sums the
    numbers of targets and tokens, 16 bytes."""
    for sent in crew(2)(sent_in_a_real_step, small_run(stage)):
        assert set(sent) == set(rehearsed)
        for kind, (_, size) in rehearsed.items():
            slack = 0.02 * size if (stage, kind) == (3, "all-gather") else 16 * (kind == "all-reduce")
            assert sent[kind][1] == pytest.approx(size, abs=slack), kind


def test_a_real_step_sends_what_is_rehearsed(crew: Any, found: Any) -> None:
    check_real_step(crew, 3, found["small"])


def test_micro_batches_repeat_the_tensor_groups_collectives(found: Any) -> None:
    one, three = (found["steps"][name]["collectives"]["tensor"] for name in ("ZeRO-1", "ZeRO-2, three"))
    for kind in ("all-gather", "reduce-scatter"):
        assert three[kind][0] == 3 * one[kind][0]


def test_the_composition_adds_up_to_the_peak(found: Any) -> None:
    for name, step in found["steps"].items():
        assert sum(step["composition"].values()) == step["peak"], name
        assert {"attention", "feed-forward and residual sums"} <= set(step["composition"]), name


def print_other_stages() -> None:
    """In a process of its own: the collectives of steps that the default tests leave out."""
    from opt_parallel.rehearsal.fake_cuda import load
    from opt_parallel.rehearsal.step import traced_step

    load()
    runs = {
        "ZeRO-1, two": run_of(micros=2),
        "offload": run_of(zero=ZeroConfig(stage=2, offload=Offload.cpu)),
    }  # fmt: skip
    others: dict[str, Any] = {name: traced_step(run, WORLD).collectives for name, run in runs.items()}
    others["small"] = [traced_step(small_run(stage), 2).collectives["data"] for stage in range(3)]
    print(json.dumps(others))


@pytest.mark.long
def test_other_stages_rehearse_too(crew: Any, found: Any) -> None:
    one, others = found["steps"]["ZeRO-1"]["collectives"], alone("print_other_stages")
    assert others["ZeRO-1, two"]["data"]["reduce"][1] == 2 * one["data"]["reduce"][1]
    assert others["ZeRO-1, two"]["tensor"]["all-gather"][0] == 2 * one["tensor"]["all-gather"][0]
    assert others["offload"] == one
    for stage, rehearsed in enumerate(others["small"]):
        check_real_step(crew, stage, rehearsed)


TASKS = {
    "pretrain": TaskConfig(),
    "finetune": TaskConfig(name=Task.finetune),
    "classify": TaskConfig(name=Task.classify, labels=["a", "b", "c"]),
}


def print_sizes() -> None:
    """In a process of its own: a step of each published size at its paper's layout on up to 1,024 ranks, with each
    kind of recomputation and each task, of four layers, and of two for tasks other than pretraining."""
    from opt_parallel.benchmarks.runs import PUBLISHED, composed
    from opt_parallel.rehearsal.fake_cuda import load
    from opt_parallel.rehearsal.step import traced_step

    load()
    faults, ratios = {}, {}
    for size in PUBLISHED:
        paper = composed([f"experiment=opt-{size}-paper", "batch.micro=1", "precision=bf16"])
        world = min(1024, paper.global_batch * paper.parallel.tensor)
        for kind in ActivationCheckpointing:
            for name, task in TASKS.items():
                layers = 4 if name == "pretrain" else 2
                model = dataclasses.replace(paper.model, num_hidden_layers=layers)
                run = dataclasses.replace(paper, model=model, task=task, activation_checkpointing=kind)
                cell = f"{size} {kind.value} {name}"
                try:
                    trace = traced_step(run, world)
                except Exception as error:
                    faults[cell] = f"{type(error).__name__}: {error}"
                    continue
                if name == "pretrain":
                    ratios[cell] = planned(run) / trace.peak
                    print(cell, f"{trace.peak / 2**30:.2f} GiB, planned ÷ traced {ratios[cell]:.3f}", flush=True)
    print(json.dumps({"faults": faults, "ratios": ratios}))


@pytest.mark.long
def test_all_sizes_rehearse_without_faults_and_as_planned() -> None:
    process = cold_python("tests/support/call.py", __file__, "print_sizes", timeout=3600)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["faults"] == {}
    far = {cell: ratio for cell, ratio in result["ratios"].items() if abs(ratio - 1) > 0.05}
    assert not far


def test_without_a_compiler_the_formulas_stand_alone(tmp_path: Path) -> None:
    words = [str(ROOT / "scripts" / "plan.py"), "model=opt-tiny", "data.sequence_length=64", "rehearse=true"]
    process = launch(1, *words, XDG_CACHE_HOME=str(tmp_path), CXX="/nonexistent/c++")
    assert process.returncode == 0, process.stderr
    assert "no rehearsal, so the formulas stand alone: /nonexistent/c++ was not found" in process.stdout


@pytest.mark.long
def test_train_rehearses_one_of_many_ranks() -> None:
    words = ["model=opt-tiny", "data.sequence_length=64", "parallel.tensor=2", "batch.global=8", "rehearse=16"]
    process = cold_python(str(ROOT / "train.py"), *words)
    assert process.returncode == 0, process.stderr
    assert "rehearsed one step of one rank in" in process.stdout
    assert "data    all-gather" in process.stdout
