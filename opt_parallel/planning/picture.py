"""The picture of a plan: its memory beside other settings', and its scaling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from opt_parallel.config.run import ActivationCheckpointing, Run
from opt_parallel.planning.plan import Plan, plan_of, scaling
from opt_parallel.planning.text import KINDS
from opt_parallel.report.plans import Bar, Line, draw_plan
from opt_parallel.runtime.errors import UserError

GIB = 2**30


def draw(path: Path, plan: Plan) -> None:
    """Write the picture in the format of the path's suffix. Raises: UserError if it cannot be written."""
    bars = [
        Bar(
            label(each.run),
            {KINDS[kind]: size / GIB for kind, size in each.memory.kinds().items()},
        )
        for each in beside(plan)
    ]
    lines = []
    for name, strong in (("the same global batch (strong)", True), ("the same batch a device (weak)", False)):
        plans = [each for each in scaling(plan, strong) if each.fits]
        devices = [each.cluster.devices for each in plans]
        lines.append(Line(name, devices, [each.time.tokens_per_second * each.cluster.devices for each in plans]))
    run, cluster = plan.run, plan.cluster
    title = f"{run.name} on {cluster.devices:,} × {cluster.device.name}, {plan.workload.precision}, planned"
    try:
        draw_plan(path, title, bars, plan.limit / GIB, lines, cluster.devices)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--picture {path} cannot be written ({error}): choose another path, such as plan.png"
        ) from error


def beside(plan: Plan) -> list[Plan]:
    """The plan, and those with each other kind of recomputation and each other ZeRO stage."""
    run = plan.run
    runs = [run]
    runs += [
        replace(run, activation_checkpointing=kind)
        for kind in ActivationCheckpointing
        if kind is not run.activation_checkpointing
    ]
    runs += [replace(run, zero=replace(run.zero, stage=stage)) for stage in (1, 2, 3) if stage != run.zero.stage]
    return [plan_of(each, plan.cluster) for each in runs]


def label(run: Run) -> str:
    return f"ZeRO-{run.zero.stage}, {run.activation_checkpointing.value}"
