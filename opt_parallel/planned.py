"""The planned memory of a run on its devices: a line before training, a refusal, and advice when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from opt_parallel.config.run import Run
from opt_parallel.parallel.topology import Topology
from opt_parallel.planning.choice import MARGIN, changes, nearest
from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.compose import cluster_file
from opt_parallel.planning.memory import Memory, of_this_trainer
from opt_parallel.planning.plan import plan_of
from opt_parallel.planning.text import KINDS, memory_line
from opt_parallel.planning.workload import of_run
from opt_parallel.report.metrics import peak_memory
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import memory_limit

GIB = 2**30
STATES = ("weights", "gradients", "masters", "moments")
# the files of configs/cluster/ by the name that the driver gives to a GPU
SHEETS = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H200": "h200-141gb",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "4090",
}
UNKNOWN = "a100-80gb"  # the file whose rates another GPU takes
# the rates of a CPU of two cores, which are not measured here because that takes up to a minute
ASSUMED: dict[str, Any] = {
    "device": "cpu", "bf16": 0.1, "fp32": 0.1, "bandwidth": 20.0, "within": 1.6, "within_latency": 50.0, "measured": {
        "small": 20.0, "attention": 0.3, "attention_backward": 0.3, "memory": 0.5, "host": 2e-3, "dropout": 4e-9,
        "eager_dropout": 2e-8, "score": 2e-8, "logit": 5e-9, "embedding": 2e-9, "update": 1e-9,
    },
}  # fmt: skip
RESERVE = 0.9  # after memory has run out, the tensors of other settings must need less than this share of the planned


@dataclass(frozen=True)
class Devices:
    """The devices of a run. `name` is what the driver calls the GPUs, None for CPUs. `memory` are the bytes of each: of
    a GPU all, of a CPU this process's equal share of the machine's memory."""

    name: str | None
    memory: int
    hosts: int
    per_host: int

    @property
    def number(self) -> int:
        return self.hosts * self.per_host

    @property
    def source_of_rates(self) -> str:
        """The origin of the rates and links that a plan assumes here, as a part of a message."""
        if self.name is None:
            return "at assumed rates; opt-parallel plan with cluster=cpu measures those of this machine"
        if file := SHEETS.get(self.name):
            return f"at the rates of cluster={file}"
        return (
            f"at the rates of cluster={UNKNOWN}, because those of {self.name} are unknown; opt-parallel plan takes "
            "others with cluster=…"
        )

    def cluster(self) -> Cluster:
        """The cluster of these devices, at the rates that `source_of_rates` names. Hosts have memory enough."""
        config = cluster_file("cpu", **ASSUMED) if self.name is None else cluster_file(SHEETS.get(self.name, UNKNOWN))
        found = config.cluster()
        device = replace(found.device, memory=self.memory)
        return replace(found, device=device, nodes=self.hosts, per_host=self.per_host, host_memory=2**62)


def devices_of(topology: Topology) -> Devices:
    hosts, world = len(set(topology.hosts)), topology.world.size
    hosts = hosts if world % hosts == 0 else 1
    if topology.device.type == "cuda":
        found = torch.cuda.get_device_properties(topology.device)
        return Devices(found.name, found.total_memory, hosts, world // hosts)
    ranks = len(topology.ranks_on(topology.hosts[topology.world.rank]))
    return Devices(None, memory_limit() // ranks, hosts, world // hosts)


def check_memory(run: Run, topology: Topology) -> None:
    """Print the planned memory of a rank, and refuse a run that cannot fit.

    On a CPU only the states count, because activations depend on the kernels that torch has for the CPU.
    Raises: UserError on every rank."""
    topology.together(lambda: _check(run, devices_of(topology)))


def _check(run: Run, devices: Devices) -> None:
    planned = of_this_trainer(of_run(run, devices.number))
    if devices.name is None:
        needed = _states(planned)
        what = f"{needed / GIB:.2f} of {devices.memory / GIB:.1f} GiB for weights and states"
    else:
        needed, what = planned.total, memory_line(planned, devices.memory)
    say(f"planned memory: {what}")
    if needed <= devices.memory:
        return
    has = f"each of {devices.per_host} processes on this machine can have"
    if devices.name is not None:
        has = f"{devices.name} has"
    line = f"the run needs {needed / GIB:,.1f} GiB on the fullest rank, and {has} {devices.memory / GIB:.1f} GiB"
    if run.plan.enforce:
        advice = _advice(run, devices, round((1 - MARGIN) * devices.memory))
        raise UserError(f"{line}: {advice}, or plan.enforce=false to try it nevertheless")
    say(f"warning: {line}")


def _states(planned: Memory) -> int:
    """Bytes of weights, gradients and the optimizer's state of a rank that are in the host's memory if it is a CPU."""
    kinds = planned.kinds()
    return sum(kinds[kind] for kind in STATES)


def _advice(run: Run, devices: Devices, limit: int) -> str:
    """The settings to try next that need at most `limit` bytes of a device, as a part of a message."""
    found = [
        f"{changes(run, each.run)} ({each.memory.total / GIB:.1f} GiB planned)"
        for each in nearest(plan_of(run, devices.cluster()), limit)
    ]
    if not found:
        return "use more devices, or a smaller model"
    return f"try {', or '.join(found)} (fewest changes first, then the fastest {devices.source_of_rates})"


@contextmanager
def explaining_out_of_memory(run: Run, topology: Topology) -> Iterator[None]:
    """A context in which a device that runs out of memory raises a UserError, with the plan beside what was measured,
    and the settings to try next."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = out_of_memory(str(error), run, devices_of(topology), peak_memory(topology.device))
        raise UserError(line) from error


def out_of_memory(why: str, run: Run, devices: Devices, measured: int) -> str:
    """What the user reads after torch's error `why`, when tensors had `measured` bytes."""
    planned, limit = of_this_trainer(of_run(run, devices.number)), devices.memory
    kinds = ", ".join(
        f"{KINDS[kind]} {size / GIB:.2f}" for kind, size in planned.kinds().items() if size > limit // 1000
    )
    target = planned.context + round(RESERVE * (min(planned.total, limit) - planned.context))
    why = why.partition("\n")[0].split(". GPU")[0]
    return (
        f"out of memory ({why}): {planned.total / GIB:.2f} GiB were planned ({kinds or 'little of each kind'}; "
        f"{planned.allocated / GIB:.2f} GiB of tensors), and tensors had {measured / GIB:.2f} GiB "
        f"of {limit / GIB:.1f}: {_advice(run, devices, target)}"
    )
