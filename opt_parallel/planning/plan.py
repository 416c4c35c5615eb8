"""The plan of a run on a cluster: its memory, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opt_parallel.config.run import Run
from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.memory import Memory, memory
from opt_parallel.planning.saving import saving
from opt_parallel.planning.timing import Time, time_of
from opt_parallel.planning.workload import Workload, of_run

DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """A run on all devices of a cluster. `memory` is that of the fullest rank, and `time` that of a step."""

    run: Run
    workload: Workload
    cluster: Cluster
    memory: Memory
    time: Time

    @property
    def limit(self) -> int:
        """Bytes of a device's memory."""
        return self.cluster.device.memory

    @property
    def spare(self) -> int:
        """Bytes of the device's memory that the fullest rank leaves, negative if the run does not fit."""
        return self.limit - self.memory.total

    @property
    def spare_on_host(self) -> int:
        """Bytes that the ranks of a host leave of its memory."""
        ranks = min(self.cluster.per_host, self.cluster.devices)
        return self.cluster.host_memory - ranks * self.memory.host

    @property
    def fits(self) -> bool:
        return self.spare >= 0 and self.spare_on_host >= 0

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without failures."""
        return self.run.stop * self.time.step

    @property
    def cost(self) -> float | None:
        """The price of all devices for all steps, or None if the price is unknown."""
        price = self.cluster.price
        return None if price is None else price * self.cluster.devices * self.seconds / 3600


def workload_on(run: Run, cluster: Cluster) -> Workload:
    """The workload of a run on all devices of `cluster`. On CPUs, torch's fused attention has no dropout."""
    workload = of_run(run, cluster.devices)
    if cluster.device.is_cpu:
        workload = replace(workload, cpu=True, flash=not workload.network.attention_dropout)
    return workload


def plan_of(run: Run, cluster: Cluster) -> Plan:
    """The plan of a run on all devices of `cluster`. `run.check_world` must accept their number."""
    workload = workload_on(run, cluster)
    time = time_of(workload, cluster)
    if every := run.checkpoint.every:
        time = replace(time, checkpoint=saving(workload, cluster, run.checkpoint.asynchronous).stall / every)
    return Plan(run, workload, cluster, memory(workload, cluster), time)


def scaled(plan: Plan, devices: int, strong: bool) -> Plan | None:
    """The plan on another number of devices, or None if the batch or the tensor groups cannot be split over them.

    With `strong` scaling the global batch stays, else it grows with the number of devices."""
    cluster, run = plan.cluster, plan.run
    per_host = min(cluster.per_host, devices)
    if devices % per_host or devices % run.parallel.tensor:
        return None
    data, micro = devices // run.parallel.tensor, run.micro_batch
    batch = run.global_batch
    if not strong:
        batch = micro * plan.workload.accumulation * data
    if batch % (micro * data):
        return None
    run = replace(run, batch={"global": batch, "micro": micro})
    return plan_of(run, replace(cluster, nodes=devices // per_host, per_host=per_host))


MOST_DEVICES = 4096


def scaling(plan: Plan, strong: bool) -> list[Plan]:
    """The plans on 1, 2, 4, … 4,096 devices, where the run can be split over them."""
    numbers = [2**power for power in range(MOST_DEVICES.bit_length())]
    plans = [scaled(plan, number, strong) for number in sorted({*numbers, plan.cluster.devices})]
    return [each for each in plans if each is not None]
