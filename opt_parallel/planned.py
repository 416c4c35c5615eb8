"""The planned memory of a run on its devices: a line before training, a refusal, and advice when memory runs out."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from opt_parallel.config.run import Run
from opt_parallel.parallel.topology import Topology
from opt_parallel.planning.choice import MARGIN, changes, nearest
from opt_parallel.planning.cluster import DEVICES, Cluster, Device
from opt_parallel.planning.plan import Plan, plan_of
from opt_parallel.planning.rates import RATES
from opt_parallel.planning.settings import MEASURED
from opt_parallel.planning.text import KINDS, memory_line
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import memory_limit

GIB = 2**30
STATES = ("weights", "gradients", "masters", "moments")
RESERVE = 0.9  # after memory has run out, the tensors of other settings must need less than this share of the planned


def check_memory(run: Run, topology: Topology) -> None:
    """Print the planned memory of a rank, and refuse a run that cannot fit.

    On a CPU only the states count, because activations depend on the kernels that torch has for the CPU.
    Raises: UserError on every rank."""
    topology.together(lambda: _check(run, topology))


def _check(run: Run, topology: Topology) -> None:
    plan = plan_here(run, topology)
    if topology.device.type == "cuda":
        needed, what = plan.memory.total, memory_line(plan)
    else:
        needed, what = _states(plan), f"{_states(plan) / GIB:.2f} of {plan.limit / GIB:.1f} GiB for weights and states"
    say(f"planned memory: {what}")
    if needed <= plan.limit:
        return
    line = f"the run needs {needed / GIB:,.1f} GiB on the fullest rank, and {_where(plan, topology)}"
    if run.plan.enforce:
        raise UserError(
            f"{line}: {_advice(plan, round((1 - MARGIN) * plan.limit))}, or plan.enforce=false to try it nevertheless"
        )
    say(f"warning: {line}")


def _states(plan: Plan) -> int:
    """Bytes of weights, gradients and the optimizer's state of a rank that are in the host's memory if it is a CPU."""
    kinds = plan.memory.kinds()
    return sum(kinds[kind] for kind in STATES)


def _where(plan: Plan, topology: Topology) -> str:
    if topology.device.type == "cuda":
        return f"{plan.cluster.device.name} has {plan.limit / GIB:.1f} GiB"
    return f"each of {plan.cluster.per_host} processes on this machine can have {plan.limit / GIB:.1f} GiB"


def _advice(plan: Plan, limit: int) -> str:
    """The settings to try next, as a part of a message."""
    found = [
        f"{changes(plan.run, each.run)} ({each.memory.total / GIB:.1f} GiB planned)" for each in nearest(plan, limit)
    ]
    return f"try {', or '.join(found)}" if found else "use more devices, or a smaller model"


def plan_here(run: Run, topology: Topology) -> Plan:
    """The plan of a run on its own devices."""
    hosts, world = len(set(topology.hosts)), topology.world.size
    hosts = hosts if world % hosts == 0 else 1
    ranks = len(topology.ranks_on(topology.hosts[topology.world.rank]))
    if topology.device.type == "cuda":
        found = torch.cuda.get_device_properties(topology.device)
        like = next((one for name, one in DEVICES.items() if name.partition("-")[0].upper() in found.name), None)
        like = like or DEVICES["a100-80gb"]
        rates = RATES[like.name.removeprefix("g").partition("-")[0]]
        device = replace(like, name=found.name, memory=found.total_memory, rates=rates)
    else:
        device = Device(
            "this machine", memory_limit() // ranks, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11}, 2e10, MEASURED
        )
    return plan_of(run, Cluster(device, hosts, world // hosts, host_memory=2**62))


@contextmanager
def explaining_out_of_memory(run: Run, topology: Topology) -> Iterator[None]:
    """A context in which a device that runs out of memory raises a UserError, with the plan beside what was measured,
    and the settings to try next."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        plan = plan_here(run, topology)
        kinds = ", ".join(
            f"{KINDS[kind]} {size / GIB:.2f}" for kind, size in plan.memory.kinds().items() if size > plan.limit // 1000
        )
        context = plan.memory.context
        limit = context + round(RESERVE * (min(plan.memory.total, plan.limit) - context))
        why = str(error).partition("\n")[0].split(". GPU")[0]
        raise UserError(
            f"out of memory ({why}): {plan.memory.total / GIB:.2f} GiB were planned ({kinds or 'little of each kind'}; "
            f"{plan.memory.allocated / GIB:.2f} GiB of tensors), and tensors had {_measured(topology) / GIB:.2f} GiB "
            f"of {plan.limit / GIB:.1f}: {_advice(plan, limit)}"
        ) from error


def _measured(topology: Topology) -> int:
    """The largest number of bytes of tensors on this rank's device, or of the process if it is a CPU."""
    if topology.device.type == "cuda":
        return torch.cuda.max_memory_allocated(topology.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
