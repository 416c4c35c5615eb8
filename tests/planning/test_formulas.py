"""The formulas of a plan: counts of parameters and FLOPs, the memory of this trainer and of others, collectives."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import yaml
from composing import run_of as composed

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import Run
from opt_parallel.planning import megatron, parameters
from opt_parallel.planning.activations import activations, layer_bytes, part_bytes
from opt_parallel.planning.cluster import DEVICES, Cluster, Link
from opt_parallel.planning.compose import cluster_file
from opt_parallel.planning.exchange import Exchange, data_bytes
from opt_parallel.planning.layer_time import Layer, collective, exposed, layer_of
from opt_parallel.planning.memory import memory
from opt_parallel.planning.plan import plan_of
from opt_parallel.planning.rates import BESIDE, TO_HOST, beside, rates_of
from opt_parallel.planning.timing import time_of
from opt_parallel.planning.workload import Network, Recompute, States, Trainer, Workload, network_of, of_run

ROOT = Path(__file__).parents[2]
SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")
H100 = Cluster(DEVICES["h100-80gb"], nodes=16)


@functools.cache
def run_of(size: str) -> Run:
    values = yaml.safe_load((ROOT / "configs" / "model" / f"opt-{size}.yaml").read_text(encoding="utf-8"))
    return Run(model=ModelConfig(**values))


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_flops_are_those_of_the_configuration(size: str) -> None:
    run = run_of(size)
    workload = of_run(run, 1)
    assert parameters.parameters(workload.network) == run.model.parameters()
    length = run.data.sequence_length
    assert parameters.model_flops(workload) == pytest.approx(run.model.flops_per_token(length), rel=1e-12)
    assert parameters.model_flops(dataclasses.replace(workload, lora=8)) == pytest.approx(
        run.model.flops_per_token(length, frozen=True)
    )
    for mode, whole in ((Recompute.selective, False), (Recompute.full, True)):
        again = parameters.recomputed_flops(dataclasses.replace(workload, recompute=mode))
        assert again == pytest.approx(run.model.recomputed_flops_per_token(length, whole), rel=0.01)


def traced() -> list[tuple[str, int, bool, str, float, float]]:
    """Size, tensor, sequence, recomputation, GiB at the peak and MiB saved by a layer, from docs/memory.md."""
    row = r"\| (\S+) \| (\d+) \| (yes|no) \| (\w+) \| ([\d.]+) GiB \| \d+% \| ([\d.,]+) MiB"
    found = re.findall(row, (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"))
    return [(size, int(t), sp == "yes", mode, float(peak), float(saved)) for size, t, sp, mode, peak, saved in found]


def test_activations_are_those_of_the_traces() -> None:
    """The table rounds peaks to 0.01 GiB and saved bytes to 0.1 MiB."""
    rows = traced()
    assert len(rows) == 52
    for size, tensor, sequence, mode, peak, saved in rows:
        workload = Workload(network_of(run_of(size)), tensor=tensor, sequence=sequence, recompute=Recompute(mode))
        assert layer_bytes(workload, workload.recompute) / 2**20 == pytest.approx(saved, abs=0.06), (size, mode)
        assert activations(workload).total / 2**30 == pytest.approx(peak, rel=0.015, abs=0.005), (size, mode, sequence)


@pytest.mark.parametrize(
    ("size", "tensor", "sequence", "mode", "micro", "gib"),
    [
        ("6.7b", 1, False, "full", 8, 6.886),
        ("13b", 2, True, "full", 8, 4.948),
        ("66b", 8, True, "full", 8, 3.746),
        ("66b", 8, False, "full", 4, 10.102),
        ("66b", 8, True, "selective", 4, 7.570),
        ("1.3b", 1, False, "offload", 8, 1.569),
        ("175b", 8, False, "offload", 1, 0.683),
    ],
)
def test_larger_micro_batches(size: str, tensor: int, sequence: bool, mode: str, micro: int, gib: float) -> None:
    """`gib` are peaks that `opt-parallel benchmark memory` traced in bf16."""
    network = network_of(run_of(size))
    workload = Workload(network, micro=micro, tensor=tensor, sequence=sequence, recompute=Recompute(mode))
    assert activations(workload).total / 2**30 == pytest.approx(gib, rel=0.003)


@pytest.mark.parametrize(
    ("stage", "accumulation", "bytes_each"),
    [(1, 1, 2 + 16 / 8), (1, 4, 2 + 16 / 8), (2, 4, 2 + 16 / 8), (3, 4, 18 / 8)],
)
def test_states_of_each_stage(stage: int, accumulation: int, bytes_each: float) -> None:
    """Bytes of a parameter on eight data ranks, see docs/architecture.md, Gradients."""
    workload = Workload(network_of(run_of("6.7b")), data=8, stage=stage, accumulation=accumulation)
    found = memory(workload, H100)
    states = found.weights + found.gradients + found.masters + found.moments
    assert states / 6.658e9 == pytest.approx(bytes_each, rel=0.002)


def test_gradients_and_activations_of_stage_0_do_not_add_up() -> None:
    """With one micro-batch there are no gradients at the loss, and at the last gradient one layer's activations."""
    network = network_of(run_of("1.3b"))
    fp32 = Workload(network, precision="fp32", states=States(weight=4, master=0), stage=0)
    wide = memory(dataclasses.replace(fp32, micro=8), H100)
    assert wide.gradients == 0
    narrow = memory(dataclasses.replace(fp32, recompute=Recompute.full), H100)
    assert narrow.peak_at == "the backward of the first layer"
    assert narrow.gradients == narrow.weights
    assert memory(dataclasses.replace(fp32, micro=8, accumulation=2), H100).gradients == narrow.gradients


def test_megatrons_layer_is_the_published_formula() -> None:
    """34 s b h + 5 a s² b bytes, and 34 s b h / t with sequence parallelism and recomputed attention (arXiv 2205.05198,
    table 2)."""
    network = Network(96, 12288, 96, 4 * 12288, 51200, activation_saves_output=False)
    plain = Workload(network, Trainer.megatron, flash=False)
    assert megatron.layer_bytes(plain, 1) == 34 * 2048 * 12288 + 5 * 96 * 2048**2
    split = dataclasses.replace(plain, tensor=8, sequence=True, recompute=Recompute.attention)
    assert megatron.layer_bytes(split, 1) == 34 * 2048 * 12288 // 8
    full = dataclasses.replace(plain, recompute=Recompute.full)
    assert megatron.layer_bytes(full, 1) == 2 * 2048 * 12288


def test_a_pipeline_holds_micro_batches_of_its_schedule() -> None:
    network = Network(96, 1024, 16, 4096, 51200)
    plain = Workload(network, Trainer.megatron, pipeline=8, accumulation=64)
    assert megatron.layers_in_flight(plain, last=False) == 96
    assert megatron.layers_in_flight(plain, last=True) == 12
    interleaved = dataclasses.replace(plain, virtual=3)
    # L (1 + (p − 1) / (p v)) in the first stage (arXiv 2205.05198, section 4.2.3)
    assert megatron.layers_in_flight(interleaved, last=False) == pytest.approx(96 * (1 + 7 / 24))
    assert megatron.layers_in_flight(interleaved, last=True) == 4 * 17


def test_an_all_gather_moves_all_parts_but_the_own() -> None:
    assert collective(8e9, 8, Link(100e9, 1e-6), 0.5) == pytest.approx(7 * (1e9 / 50e9 + 1e-6))
    assert collective(8e9, 1, Link(100e9, 1e-6), 0.5) == 0.0


def test_time_adds_up_and_answers_to_each_part() -> None:
    run = composed("model=opt-6.7b", "batch.global=128", "parallel.tensor=2", "precision=bf16")
    workload = of_run(run, 16)
    time = time_of(workload, H100)
    assert time.step == pytest.approx(sum(time.parts().values()))
    assert time.tokens_per_second == pytest.approx(128 * 2048 / time.step / 16)
    assert 0.2 < time.mfu < time.hfu + 1e-9 < 0.7
    full = time_of(dataclasses.replace(workload, recompute=Recompute.full), H100)
    assert full.products > time.products
    assert full.mfu < time.mfu < full.hfu * 1.1
    slow = dataclasses.replace(H100, within=Link(45e9, 5e-6))
    assert time_of(workload, slow).tensor > 3 * time.tensor
    assert time_of(dataclasses.replace(workload, tensor=1, data=16), H100).tensor == 0.0


@pytest.mark.parametrize(("stage", "lora"), [(0, 0), (1, 0), (2, 8), (3, 0), (3, 8)])
def test_the_time_of_the_data_group_is_that_of_all_bytes_it_sends(stage: int, lora: int) -> None:
    """With nothing to hide it and no latency, an exchange takes the time of its bytes, an all-reduce twice that."""
    idle = Layer(0.0, 0.0, 0.0, 0.0, 1 / 3)
    workload = Workload(network_of(run_of("125m")), data=16, accumulation=3, stage=stage, lora=lora)
    exchange = Exchange(workload, dataclasses.replace(H100, between=Link(50e9, 0.0), within=Link(450e9, 0.0)))
    sent = sum(data_bytes(workload).values()) * (2 if stage == 0 else 1)
    assert exchange.exposed(idle, workload.network.layers) == pytest.approx(exchange.ring(sent))


def test_the_cores_of_a_cpu_do_not_compute_while_they_send() -> None:
    gpu = H100.device
    assert exposed(2.0, 3.0, beside(gpu)) == pytest.approx(BESIDE * 2.0)
    assert exposed(2.0, 1.0, beside(gpu)) == pytest.approx(1.0 + BESIDE)
    cpu = dataclasses.replace(gpu, rates=rates_of(gpu, Workload(network_of(run_of("125m")))))
    assert exposed(2.0, 3.0, beside(cpu)) == 2.0


def test_a_small_network_waits_for_the_host() -> None:
    small = Workload(network_of(run_of("125m")), length=128)
    assert time_of(small, H100).launching > 0
    large = Workload(network_of(run_of("6.7b")), micro=4, stage=2)
    assert time_of(large, H100).launching == 0


def test_a_cpu_computes_what_a_gpu_hides() -> None:
    """On a CPU, the host's time, dropout and unfused attention come in addition."""
    costs = {"dropout": 1e-9, "eager_dropout": 9e-9, "score": 2e-8, "logit": 5e-9, "embedding": 2e-9, "update": 1e-9}
    rates = {"small": 0.0, "attention": 0.5, "attention_backward": 0.5, "memory": 1e3, "host": 2e-3}
    config = cluster_file("cpu", fp32=0.1, bf16=0.1, bandwidth=20.0, memory=64.0, host_memory=64.0)
    cpu = dataclasses.replace(config, measured=rates | costs).cluster()
    run = composed("model=opt-125m", "precision=fp32", "batch.micro=1", "batch.global=1", "data.sequence_length=512")
    planned = plan_of(run, cpu)
    assert planned.workload.cpu
    assert not planned.workload.flash
    assert planned.time.launching == pytest.approx(12 * 2e-3)
    assert planned.time.optimizer == pytest.approx(1e-9 * run.model.parameters(), rel=0.02)
    # 2 products forward and 4 backward of 64 multiplications, for each of 12 × 12 × 512² scores
    assert planned.time.attention == pytest.approx(144 * 512**2 * (6 * 2 * 64 / 1e11 + 2e-8))
    eager = 12 * 2 * 512 * 768 * 9e-9
    logits = 512 * 50272 * 5e-9
    gradients = 50272 * 768 * 2e-9
    assert planned.time.elementwise == pytest.approx(eager + logits + gradients, rel=0.01)
    compiled = plan_of(dataclasses.replace(run, batch={"global": 2, "micro": 2}), cpu)
    assert compiled.time.elementwise == pytest.approx(2 * (eager / 9 + logits) + gradients, rel=0.01)
    still = composed("model=opt-125m", "precision=fp32", "model.dropout=0", "model.attention_dropout=0")
    assert plan_of(still, cpu).workload.flash


def test_a_plan_needs_no_more_memory_for_fewer_states() -> None:
    network = network_of(run_of("1.3b"))
    fp32 = Workload(network, precision="fp32", states=States(weight=4))
    assert memory(fp32, H100).weights == 2 * memory(Workload(network), H100).weights
    offloaded = memory(dataclasses.replace(fp32, offload=True), H100)
    assert offloaded.masters == offloaded.moments == 0
    assert offloaded.host > memory(fp32, H100).host
    assert ModelConfig().hidden_size == network_of(Run()).hidden


def test_copies_of_inputs_to_the_host_count_as_far_as_they_outlast_the_layers() -> None:
    workload = Workload(Network(24, 1024, 16, 4096, 50272), micro=8, accumulation=2, recompute=Recompute.offload)
    fast = dataclasses.replace(H100, to_host=1e15)
    slow = dataclasses.replace(H100, to_host=1e9)
    assert time_of(workload, fast).offload == 0
    layer = layer_of(workload, slow)
    copies = 2 * part_bytes(workload) / (1e9 * TO_HOST)
    assert time_of(workload, slow).offload == pytest.approx(2 * 24 * (copies - layer.total))
    for kind in (Recompute.none, Recompute.selective, Recompute.full):
        assert time_of(dataclasses.replace(workload, recompute=kind), slow).offload == 0
    wide = dataclasses.replace(workload, network=Network(24, 8192, 64, 32768, 50272))
    assert time_of(wide, H100).offload == 0, "a layer's computation grows faster than its input"


def test_an_offloaded_optimizer_copies_gradients_and_weights() -> None:
    """4 bytes of gradient to the host, after a second micro-batch also back and again, and 2 bytes of weight back."""
    network = Network(24, 1024, 16, 4096, 50272)
    workload = Workload(network, data=4, offload=True)
    each = parameters.parameters(network) / 4 / (H100.to_host * TO_HOST)
    assert time_of(workload, H100).offload == pytest.approx(each * (4 + 2), rel=1e-3)
    twice = dataclasses.replace(workload, accumulation=2)
    assert time_of(twice, H100).offload == pytest.approx(each * (12 + 2), rel=1e-3)
    assert (
        time_of(workload, H100).optimizer > 10 * time_of(dataclasses.replace(workload, offload=False), H100).optimizer
    )
