"""How long the ranks of a run read the weights of `init_from`."""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.plan import Plan
from opt_parallel.planning.settings import ClusterConfig
from opt_parallel.planning.states import rank_parameters


@dataclass(frozen=True)
class Loading:
    """`stored` are the bytes of the weights in their files, `rank` those that a rank reads, and `seconds` the time in
    which all ranks read theirs at `storage` GB/s."""

    name: str
    stored: int
    rank: int
    storage: float
    seconds: float


def loading(plan: Plan, config: ClusterConfig, stored: int) -> Loading:
    """Loading `stored` bytes of weights from the storage of a cluster. A rank reads the part that it holds before ZeRO
    splits it, so data ranks read the same bytes."""
    rank = round(stored * rank_parameters(plan.workload) / plan.run.model.parameters())
    seconds = rank * plan.cluster.devices / (config.storage * 1e9)
    return Loading(str(plan.run.init_from), stored, rank, config.storage, seconds)
