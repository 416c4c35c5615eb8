"""Bytes of weights, gradients, fp32 masters and moments on a rank of this trainer (`gradients.py`, `engine.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.parameters import (
    embedding_parameters,
    first_parameters,
    last_parameters,
    layer_parameters,
    lora_parameters,
)
from opt_parallel.planning.workload import Workload


@dataclass(frozen=True)
class Held:
    """Bytes of a rank's states. `buffers` are gradients on their way to the rank that owns them, `gathered` weights of
    ZeRO-3 that are not split while they are used. `host` are bytes in the host's memory."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    buffers: int = 0
    gathered: int = 0
    host: int = 0


def rank_parameters(workload: Workload) -> int:
    """The parameters of one tensor rank, before ZeRO splits them."""
    network, tensor = workload.network, workload.tensor
    ends = first_parameters(network, tensor) + last_parameters(network, tensor)
    return network.layers * layer_parameters(network, tensor).total + ends


def held(workload: Workload) -> Held:
    """The states of a rank of this trainer."""
    every = rank_parameters(workload)
    trained = lora_parameters(workload) if workload.lora else every
    weights = workload.states.weight * (every + (trained if workload.lora else 0))
    if workload.stage == 0:
        return Held(weights, 4 * trained, 0, workload.states.moments * trained)
    part = -(-trained // workload.data)
    optimizer = {"masters": workload.states.master * part, "moments": workload.states.moments * part}
    if workload.offload:
        optimizer = {"host": sum(optimizer.values()) + 4 * part}
    if workload.stage == 3:
        return _fully_split(workload, weights, part, optimizer)
    direct = workload.data == 1 and not workload.offload
    buffers = 0 if direct else 2 * 4 * min(workload.reduce_bucket, trained)
    return Held(weights, gradients=0 if workload.offload else 4 * part, buffers=buffers, **optimizer)


def _fully_split(workload: Workload, weights: int, part: int, optimizer: dict[str, int]) -> Held:
    """Stage 3. At most one and a half layers and the prefetched weights are gathered, or the token embedding."""
    network, value = workload.network, workload.states.weight
    layer = layer_parameters(network, workload.tensor)
    live = (
        0
        if workload.data == 1
        else max(layer.total * 3 // 2 + workload.prefetch_bucket, embedding_parameters(network, workload.tensor))
    )
    whole = layer.whole * network.layers if 2 * network.hidden < workload.persistence and workload.data > 1 else 0
    return Held(
        weights=weights // workload.data,
        gradients=0 if workload.offload else 4 * part,
        buffers=4 * min(workload.reduce_bucket, part * workload.data),
        gathered=value * (min(live, weights // value) + whole),
        **optimizer,
    )
