"""What a checkpoint holds, and how long saving it takes."""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.parameters import lora_parameters
from opt_parallel.planning.rates import TO_HOST
from opt_parallel.planning.states import rank_parameters
from opt_parallel.planning.workload import Workload

SAVED = 12  # bytes of a trained parameter: its weight and both moments in fp32


@dataclass(frozen=True)
class Saving:
    """`stall` are the seconds for which a save stops training, and `writing` those until it is complete."""

    stall: float
    writing: float


def saved_bytes(workload: Workload) -> int:
    """Bytes that a rank writes. The data ranks of a tensor rank share its parameters equally."""
    trained = lora_parameters(workload) if workload.lora else rank_parameters(workload)
    return SAVED * -(-trained // workload.data)


def saving(workload: Workload, cluster: Cluster, asynchronous: bool) -> Saving:
    """A save copies the state to the host, and then writes it while training continues or, unless it is `asynchronous`,
    before the next step. All ranks together write at the rate of the storage."""
    copying = saved_bytes(workload) / (cluster.to_host * TO_HOST)
    writing = copying + saved_bytes(workload) * cluster.devices / cluster.storage
    return Saving(copying if asynchronous else writing, writing)
