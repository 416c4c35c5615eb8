"""Seconds of the copies between a device and its host's memory."""

from __future__ import annotations

from opt_parallel.planning.activations import part_bytes
from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.layer_time import Layer
from opt_parallel.planning.parameters import lora_parameters
from opt_parallel.planning.rates import TO_HOST
from opt_parallel.planning.states import rank_parameters
from opt_parallel.planning.workload import Recompute, Workload


def offloaded_inputs(workload: Workload, cluster: Cluster, layer: Layer) -> float:
    """What `activation_checkpointing=offload` adds to a step: in the forward a layer's input is copied to the host
    while the layer computes, in the backward the next layer's input is copied back (`parallel/recompute.py`). The
    copies have a stream of their own and use no multiprocessors, so only what outlasts the computation counts (Rhu et
    al. 2016, arXiv 1602.08124, section III)."""
    if workload.recompute is not Recompute.offload:
        return 0.0
    copy = part_bytes(workload) / (cluster.to_host * TO_HOST)
    forward = layer.total * layer.forward
    outlasts = max(0.0, copy - forward) + max(0.0, copy - (layer.total - forward))
    return workload.accumulation * workload.network.layers * outlasts


def offloaded_states(workload: Workload, cluster: Cluster) -> float:
    """What `zero.offload=cpu` adds to a step, beside the update. After the first micro-batch the fp32 gradients of this
    rank's part are copied to the host. After each further one they are copied back, added to and copied again. After
    the update, the part's weights are copied back. The copies are in the stream of the computation."""
    if not workload.offload:
        return 0.0
    trained = lora_parameters(workload) if workload.lora else rank_parameters(workload)
    each = 4 * (2 * workload.accumulation - 1) + workload.states.weight
    return trained / workload.data * each / (cluster.to_host * TO_HOST)
