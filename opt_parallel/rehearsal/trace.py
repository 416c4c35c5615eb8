"""Trace the memory and the collectives of a micro-batch without a GPU.

The network of a run is built of fake CUDA tensors, with a process group whose ranks do not exist. Its forward and
backward pass then allocate and free tensors as on a GPU, but nothing is computed. The traced bytes are those of
activations and temporary tensors. The bytes of weights, gradients, the optimizer's state and ZeRO's buffers are not
traced, because they follow from the number of parameters.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from opt_parallel.config.run import Run
from opt_parallel.model.build import network
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import Shard, fill
from opt_parallel.parallel.topology import DTYPES, Group
from opt_parallel.rehearsal.fake_cuda import DEVICE, fake_tensors, group_of, load
from opt_parallel.rehearsal.ledger import Ledger, Trace

DEPTHS = (4, 6)  # a deeper network is extrapolated from networks of these numbers of layers


def nothing(name: str, shard: Shard) -> Tensor:
    return torch.empty([part.stop - part.start for part in shard.range])


def fake_network(run: Run, group: Group) -> CausalLM:
    """This run's language model of fake CUDA tensors, as the first rank of its tensor group holds it."""
    model = network(run.model, run.task.lora, None, group, run.activation_checkpointing, run.parallel.sequence)
    assert isinstance(model, CausalLM)
    fill(model, nothing, DEVICE, DTYPES[run.precision.name])
    return model


def micro_batch_loss(model: nn.Module, run: Run, device: torch.device) -> Tensor:
    """The loss of one micro-batch of zeros in training."""
    ids = torch.zeros(run.micro_batch, run.data.sequence_length, dtype=torch.long, device=device)
    samples = torch.zeros(run.micro_batch, dtype=torch.long, device=device)
    loss = model(ids, ids.clone(), None, None, Draw(run.seed, 0, 0, 0, samples))
    assert isinstance(loss, Tensor)
    return loss


def without_gradients(model: nn.Module) -> None:
    """Free each gradient when it is complete, as ZeRO does after it has copied the gradient."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))


def trace(run: Run, layers: int) -> Trace:
    """Trace the run's network with this number of layers. `load` must have been called in this process."""
    # LayerDrop only removes activations. Without it, all layers are equal.
    run = replace(run, model=replace(run.model, num_hidden_layers=layers, layerdrop=0.0))
    found, group = Trace(layers), group_of(run.parallel.tensor)
    with fake_tensors():
        model = fake_network(run, group)
        without_gradients(model)
        ledger = Ledger(found, model.parameters(), {"tensor": group})
        with ledger, ledger.compiling():
            loss = micro_batch_loss(model, run, DEVICE)
            found.held = ledger.now
            (loss * 1.0).backward()
    return found


def extrapolated(run: Run) -> Trace:
    """The trace of the run's network, computed from two shallow networks. All layers allocate the same tensors, so the
    bytes at each operator grow linearly with the number of layers."""
    layers = run.model.num_hidden_layers
    low, high = trace(run, DEPTHS[0]), trace(run, DEPTHS[1])

    def at_depth(first: int, second: int) -> int:
        return second + (second - first) * (layers - high.layers) // (high.layers - low.layers)

    def each(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
        return {name: at_depth(first.get(name, 0), value) for name, value in second.items()}

    messages, sent = each(low.messages(), high.messages()), each(low.sent(), high.sent())
    return Trace(
        layers,
        at_depth(low.held, high.held),
        each(low.peaks, high.peaks),
        (high.held - low.held) // (high.layers - low.layers),
        each(low.composition, high.composition),
        {"tensor": {kind: (count, sent[kind]) for kind, count in messages.items()}} if messages else {},
    )


def traces(runs: list[Run]) -> list[Trace]:
    """The traces of several runs, computed in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_load_and_trace, runs).result()


def _load_and_trace(runs: list[Run]) -> list[Trace]:
    load()
    return [extrapolated(run) for run in runs]
