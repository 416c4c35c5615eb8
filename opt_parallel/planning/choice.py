"""The fastest settings that fit: the search behind `auto`, and the settings nearest to those that do not fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from opt_parallel.config.overrides import AUTO, PLANNED
from opt_parallel.config.run import ActivationCheckpointing, Precision, Run
from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.memory import memory
from opt_parallel.planning.plan import Plan, plan_of, workload_on
from opt_parallel.runtime.errors import UserError

GIB = 2**30
MOST_MICRO = 64  # sequences of a micro-batch that the search considers
MARGIN = 0.04  # the share of a device's memory that chosen settings leave free, since a plan is not exact
SAME = 0.002  # relative difference of two times that are called the same
PARTS = {
    "products": "products",
    "attention": "attention",
    "elementwise": "elementwise",
    "launching": "waiting for the host",
    "tensor": "tensor collectives",
    "data": "data collectives",
    "offload": "copies to and from the host",
    "pipeline": "waiting for stages",
    "optimizer": "optimizer",
    "checkpoint": "saving",
}


@dataclass(frozen=True)
class Choice:
    """The fastest plan that fits, the next fastest, and what speaks against each other value of a free key.

    `searched` counts the settings that were compared, and `fitting` those that fit."""

    best: Plan
    others: list[Plan]
    against: list[tuple[str, str]]
    searched: int
    fitting: int


def settings(run: Run) -> dict[str, str]:
    """The values of the keys that `auto` sets, as the user types them."""
    return {
        "parallel.tensor": str(run.parallel.tensor),
        "zero.stage": str(run.zero.stage),
        "batch.micro": str(run.micro_batch),
        "activation_checkpointing": run.activation_checkpointing.value,
    }


def words(run: Run, keys: Collection[str] = PLANNED) -> str:
    """The settings as words of a command line."""
    return " ".join(f"{key}={value}" for key, value in settings(run).items() if key in keys)


def with_settings(run: Run, tensor: int, stage: int, micro: int, recompute: ActivationCheckpointing) -> Run:
    """The run with other values of the keys that `auto` sets. Raises: UserError."""
    return replace(
        run,
        parallel=replace(run.parallel, tensor=tensor),
        zero=replace(run.zero, stage=stage),
        batch={"global": run.global_batch, "micro": micro},
        activation_checkpointing=recompute,
    )


def candidates(run: Run, cluster: Cluster, free: Collection[str]) -> Iterator[Run]:
    """All runs with other values of the `free` keys that can run on the cluster and compute the same."""
    devices, model = cluster.devices, run.model
    tensors = _divisors(devices) if "parallel.tensor" in free else [run.parallel.tensor]
    stages = range(4) if "zero.stage" in free else [run.zero.stage]
    if run.precision.name is not Precision.fp32:
        stages = [stage for stage in stages if stage > 0]
    kinds = list(ActivationCheckpointing) if "activation_checkpointing" in free else [run.activation_checkpointing]
    for tensor in tensors:
        if not run.parallel.allow_cross_node and cluster.nodes > 1 and cluster.per_host % tensor:
            continue
        if model.num_attention_heads % tensor or model.ffn_dim % tensor or devices % tensor:
            continue
        each, rest = divmod(run.global_batch, devices // tensor)
        if rest:
            continue
        micros = [size for size in _divisors(each) if size <= MOST_MICRO]
        for micro in micros if "batch.micro" in free else [size for size in micros if size == run.micro_batch]:
            for stage in stages:
                if 1 in stages and (stage == 2 or (stage > 1 and devices == tensor)):
                    continue  # the same as stage 1
                for kind in kinds:
                    yield with_settings(run, tensor, stage, micro, kind)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def choose(run: Run, cluster: Cluster, free: Collection[str]) -> Choice:
    """The fastest values of the `free` keys that fit.

    Raises: UserError if no settings fit, with those that need least."""
    searched, fitting, least = 0, list[Plan](), None
    for each in candidates(run, cluster, free):
        searched += 1
        needed = memory(workload_on(each, cluster), cluster).total
        if needed > (1 - MARGIN) * cluster.device.memory:
            least = min(least or (needed, each), (needed, each), key=lambda pair: pair[0])
            continue
        plan = plan_of(each, cluster)
        if plan.fits:
            fitting.append(plan)
    if not fitting:
        raise UserError(_nothing_fits(run, cluster, free, least))
    fitting.sort(key=_preference)
    best, *others = fitting
    return Choice(best, others[:3], _against(best, cluster, free), searched, len(fitting))


def _preference(plan: Plan) -> tuple[float, ...]:
    """The order of plans: the fastest first, and of those as fast within `SAME` the simplest."""
    run = plan.run
    kind = list(ActivationCheckpointing).index(run.activation_checkpointing)
    speed = round(math.log(plan.time.step) / SAME)
    return speed, kind, run.zero.stage, run.parallel.tensor, plan.memory.total


def _nothing_fits(run: Run, cluster: Cluster, free: Collection[str], least: tuple[int, Run] | None) -> str:
    where = f"{cluster.devices:,} × {cluster.device.name}"
    if least is None:
        return (
            f"{', '.join(f'{key}={AUTO}' for key in sorted(free))}: no values divide batch.global={run.global_batch} "
            f"over {where}: choose a batch.global that is a multiple of the data ranks"
        )
    needed, smallest = least
    return (
        f"no settings fit on {where}: {words(smallest)} needs least, {needed / GIB:.1f} GiB of "
        f"{cluster.device.memory / GIB:.1f}, of which {MARGIN:.0%} stay free: plan more devices (cluster.nodes), "
        "larger ones, or zero.offload=cpu"
    )


def _against(best: Plan, cluster: Cluster, free: Collection[str]) -> list[tuple[str, str]]:
    """What speaks against each other value of one free key, with the other keys as chosen."""
    chosen, found = settings(best.run), dict[str, str]()
    for key in [key for key in PLANNED if key in free]:
        for run in candidates(best.run, cluster, {key}):
            if settings(run) != chosen:
                found[words(run, {key})] = _reason(best, plan_of(run, cluster))
    return list(found.items())


def _reason(best: Plan, other: Plan) -> str:
    if 0 <= other.spare < MARGIN * other.limit:
        return f"needs {other.memory.total / GIB:.1f} GiB, which leaves less than {MARGIN:.0%} free"
    if other.spare < 0:
        return f"needs {other.memory.total / GIB:.1f} GiB, {-other.spare / GIB:.1f} more than a device has"
    if other.spare_on_host < 0:
        return f"needs {-other.spare_on_host / GIB:.1f} GiB more than a host has"
    slower = other.time.step / best.time.step - 1
    if slower < SAME:
        more = (other.memory.total - best.memory.total) / GIB
        return f"as fast, and needs {more:.1f} GiB more" if more > 0 else "as fast"
    theirs, ours = other.time.parts(), best.time.parts()
    name, lost = max(((name, theirs[name] - ours[name]) for name in ours), key=lambda pair: pair[1])
    return f"{slower:.1%} slower, of which {PARTS[name]} {lost * 1000:,.0f} ms"


def nearest(plan: Plan, limit: int, number: int = 3) -> list[Plan]:
    """Settings that need at most `limit` bytes of a device: those first that change the fewest keys, and among these
    the fastest."""
    before, found = settings(plan.run), list[Plan]()

    def changed(run: Run) -> int:
        return sum(value != before[key] for key, value in settings(run).items())

    runs = list(candidates(plan.run, plan.cluster, PLANNED))
    for distance in range(1, len(PLANNED) + 1):
        plans = [plan_of(run, plan.cluster) for run in runs if changed(run) == distance]
        fitting = [each for each in plans if each.memory.total <= limit and each.spare_on_host >= 0]
        found += sorted(fitting, key=lambda each: each.time.step)
        if len(found) >= number:
            break
    return found[:number]


def changes(before: Run, after: Run) -> str:
    """The settings of `after` that differ from those of `before`, as words of a command line."""
    old = settings(before)
    return words(after, [key for key, value in settings(after).items() if value != old[key]])
