"""Rehearse one optimizer step of a run for one of many ranks, on fake CUDA tensors and with ranks that do not exist.

The real network, loss, recomputation, parallel layers, sums of gradients (ZeRO-1 and 2), norm and optimizer run. At
stages 0 and 3, `exchange.py` sends what DeepSpeed would send.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opt_parallel.config.model import Labels, ProblemType
from opt_parallel.config.optimizer import StateDtype
from opt_parallel.config.run import Offload, Run
from opt_parallel.model.build import network
from opt_parallel.optim import build_optimizer, norm_of
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import fill
from opt_parallel.parallel.topology import DTYPES, Group
from opt_parallel.rehearsal.exchange import Gathered, Partitioned, Whole
from opt_parallel.rehearsal.fake_cuda import DEVICE, built, fake_tensors, group_of, load
from opt_parallel.rehearsal.ledger import Fault, Ledger, Trace, explaining_faults
from opt_parallel.rehearsal.trace import nothing
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.machine import resident_peak


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsed step has shown, and what it took: seconds, and the peak memory of its process in bytes."""

    trace: Trace
    seconds: float
    process_memory: int


def rehearse(run: Run, world: int) -> Rehearsal:
    """Rehearse a step of the first of `world` ranks, in a process of its own.

    Raises: UserError if the step has a fault, or where fake CUDA tensors are not available."""
    built()  # What is missing is known here, without starting a process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_rehearsed, run, world).result()
        except Fault as fault:
            raise UserError(f"the rehearsal of the step failed: {fault}") from fault


def _rehearsed(run: Run, world: int) -> Rehearsal:
    load()
    started = time.perf_counter()
    found = traced_step(run, world)
    peak = resident_peak()
    return Rehearsal(found, time.perf_counter() - started, peak)


def traced_step(run: Run, world: int, change: Callable[[nn.Module], None] = lambda model: None) -> Trace:
    """The trace of a step of the first of `world` ranks. `load` must have been called in this process. Tests `change`
    the network before the step.

    Raises: Fault."""
    # LayerDrop only removes activations.
    run = replace(run, model=replace(run.model, layerdrop=0.0))
    tensor = group_of(run.parallel.tensor)
    data = group_of(world // tensor.size, apart=tensor.size)
    found = Trace(run.model.num_hidden_layers)
    with explaining_faults(), fake_tensors():
        model = _network(run, tensor)
        change(model)
        gradients = _gradients(run, model, data)
        known = [*model.parameters(), *gradients.states()]
        ledger = Ledger(found, known, {"tensor": tensor, "data": data}, strict=True)
        with ledger, ledger.compiling(), ledger.placing():
            _step(run, model, gradients, tensor, data, ledger)
    return found


def _network(run: Run, group: Group) -> nn.Module:
    """The run's network as the first rank of its tensor group holds it."""
    labels = None
    if run.task.name.classifies:
        kind = run.task.problem_type or ProblemType.single_label_classification
        labels = Labels.numbered(len(run.task.labels or (0, 1)), kind)
    recompute, sequence = run.activation_checkpointing, run.parallel.sequence
    model = network(run.model, run.task.lora, labels, group, recompute, sequence)
    fill(model, nothing, DEVICE, DTYPES[run.precision.name])
    return model


def _step(run: Run, model: nn.Module, gradients: Any, tensor: Group, data: Group, ledger: Ledger) -> None:
    """A step as `Engine.step` takes it, without reading the loss and the norm. All micro-batches allocate and send the
    same, so only one is computed, and its collectives are multiplied."""
    micros = run.global_batch // (run.micro_batch * data.size)
    loss = _loss(run, model)
    total = loss.detach()
    ledger.trace.held = ledger.now
    gradients.backward(loss * 1.0, first=True, last=True)
    del loss
    ledger.repeat("tensor", micros)
    ledger.repeat("data", gradients.exchanges(micros))
    if run.zero.offload is Offload.cpu:  # the norm and the update are computed on the CPU
        ledger.strict = False
        total = total.cpu()
    sums = all_reduce(torch.cat([gradients.squares(), total[None]]), data)
    norm_of(sums[:2], tensor)
    ledger.counting = False  # the optimizer's moments are no activations
    gradients.update(1.0)


def _loss(run: Run, model: nn.Module) -> Tensor:
    """The loss of one micro-batch of zeros in training."""
    shape = (run.micro_batch, run.data.sequence_length)
    ids = torch.zeros(shape, dtype=torch.long, device=DEVICE)
    samples = torch.zeros(shape[0], dtype=torch.long, device=DEVICE)
    segments = None if run.task.name.plain_text else torch.ones_like(ids)
    labels = ids.clone()
    if run.task.name.classifies:
        one = run.task.problem_type in (None, ProblemType.single_label_classification)
        numbers = torch.zeros(shape[0], len(run.task.labels or (0, 1)), device=DEVICE)
        labels = samples.clone() if one else numbers
    loss = model(ids, labels, None, segments, Draw(run.seed, 0, 0, 0, samples))
    assert isinstance(loss, Tensor)
    return loss


def _gradients(run: Run, model: nn.Module, data: Group) -> Any:
    """What takes the gradients of a step, with the methods of `gradients.py`."""
    if run.zero.stage == 0:
        return Whole(model, data)
    if run.zero.stage == 3:
        return Gathered(model, data, run.zero, run.model.layer_parameters // run.parallel.tensor)
    return Partitioned(model, _partitions(run, model, data), data, run.zero.reduce_bucket_size)


def _partitions(run: Run, model: nn.Module, data: Group) -> Any:
    """What `PartitionedGradients` reads of DeepSpeed's optimizer: each parameter group as one flat tensor, and this
    rank's fp32 partition of it."""
    optimizer = build_optimizer(model, run.optimizer)
    groups, flats, parts = [], [], []
    place: dict[str, Any] = {"device": DEVICE}
    if run.zero.offload is Offload.cpu:
        place = {"device": "cpu", "pin_memory": True}
    for group in optimizer.param_groups:
        groups.append(group["params"])
        share = -(-sum(tensor.numel() for tensor in groups[-1]) // (2 * data.size)) * 2
        flats.append(torch.empty(share * data.size, dtype=groups[-1][0].dtype, device=DEVICE))
        if run.optimizer.state_dtype is StateDtype.bf16:
            parts.append(nn.Parameter(flats[-1].chunk(data.size)[0]))
            parts[-1].grad_dtype = torch.float32
        else:
            parts.append(nn.Parameter(torch.empty(share, dtype=torch.float32, **place)))
        if run.zero.offload is Offload.cpu:
            parts[-1].grad = torch.empty(share, dtype=torch.float32, **place)
        group["params"] = [parts[-1]]
    made = SimpleNamespace(
        optimizer=optimizer, bit16_groups=groups, bit16_groups_flat=flats, single_partition_of_fp32_groups=parts,
        parallel_partitioned_bit16_groups=[flat.chunk(data.size) for flat in flats], _grad_acc_hooks=[],
    )  # fmt: skip
    if run.zero.offload is Offload.cpu:
        made.param_buffer_of_bit16_for_cpu_offload_groups = [
            torch.empty(len(part), dtype=flat.dtype, **place) for part, flat in zip(parts, flats, strict=True)
        ]
    return made
