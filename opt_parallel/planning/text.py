"""A plan as text for the terminal, and as JSON."""

from __future__ import annotations

from typing import Any

from opt_parallel.planning.accuracy import LINE
from opt_parallel.planning.choice import PARTS, Choice, settings, words
from opt_parallel.planning.loading import Loading
from opt_parallel.planning.memory import Memory
from opt_parallel.planning.plan import DAY, Plan, scaling
from opt_parallel.planning.rates import UNFITTED, is_fitted
from opt_parallel.planning.reliability import PUBLISHED, Reliability
from opt_parallel.runtime.log import aligned, bytes_in_words

GIB = 2**30
# how far plans are from published measurements
VALIDATION = f"{LINE}; docs/planning-formulas.md has them"
KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "masters": "fp32 weights",
    "moments": "moments",
    "activations": "activations",
    "logits": "the loss",
    "buffers": "gradients on their way",
    "gathered": "gathered weights",
    "reserved": "held by the allocator",
    "context": "driver and communicators",
}


def title(plan: Plan) -> str:
    """The run, the cluster and the layout in a line."""
    run, work, cluster = plan.run, plan.workload, plan.cluster
    hosts = f" on {cluster.nodes} hosts" if cluster.nodes > 1 else ""
    return (
        f"{run.name}, {run.model.parameters() / 1e9:,.3g}B parameters, on {cluster.devices:,} × {cluster.device.name}"
        f"{hosts}: data({work.data}) × tensor({work.tensor}), ZeRO-{run.zero.stage}, {work.precision}, "
        f"activation_checkpointing={run.activation_checkpointing.value}, micro-batch {work.micro} × {work.length:,} "
        f"tokens, {work.accumulation} in a step of {work.tokens:,} tokens"
    )


def memory_line(memory: Memory, limit: int) -> str:
    """The memory of the fullest rank in a line, beside the bytes `limit` of a device."""
    kinds = sorted(memory.kinds().items(), key=lambda pair: -pair[1])
    largest = ", ".join(f"{KINDS[kind]} {size / GIB:.1f}" for kind, size in kinds[:4] if size)
    return f"{memory.total / GIB:.1f} of {limit / GIB:.1f} GiB on the fullest rank ({largest})"


def verdict(plan: Plan) -> str:
    """Whether the plan fits, and by how much."""
    where = f"the peak is in {plan.memory.peak_at}"
    if plan.spare < 0:
        return f"does not fit: {-plan.spare / GIB:.1f} GiB too much; {where}"
    if plan.spare_on_host < 0:
        return f"does not fit: the ranks of a host need {-plan.spare_on_host / GIB:.1f} GiB more than it has"
    return f"fits: {plan.spare / GIB:.1f} GiB ({plan.spare / plan.limit:.0%}) are free; {where}"


def memory_table(plan: Plan) -> str:
    rows = [["memory of the fullest rank", "GiB", ""]]
    for kind, size in plan.memory.kinds().items():
        if size:
            rows.append([KINDS[kind], f"{size / GIB:.2f}", f"{size / plan.limit:.1%}"])
    rows.append(["sum", f"{plan.memory.total / GIB:.2f}", f"{plan.memory.total / plan.limit:.1%}"])
    if plan.memory.host:
        rows.append(["on the host, for each device", f"{plan.memory.host / GIB:.2f}", ""])
    return aligned(rows)


def time_table(plan: Plan) -> str:
    rows, step = [["a step", "ms", ""]], plan.time.step
    for part, seconds in plan.time.parts().items():
        if seconds:
            rows.append([PARTS[part], f"{1000 * seconds:,.1f}", f"{seconds / step:.1%}"])
    return aligned([*rows, ["sum", f"{1000 * step:,.1f}", "100.0%"]])


def speed_line(plan: Plan) -> str:
    time, cost = plan.time, plan.cost
    return (
        f"{time.tokens_per_second:,.0f} tokens/s a device, {time.model_flops / time.step / 1e12:,.4g} TFLOP/s of the "
        f"model, MFU {time.mfu:.1%}, HFU {time.hfu:.1%}; {plan.run.stop:,} steps take {duration(plan.seconds)}"
        + ("" if cost is None else f" and cost ${cost:,.0f}")
    )


def rates_line(plan: Plan) -> str:
    """Whose shares of the peak the times assume if none were fitted for the device, else nothing."""
    device = plan.cluster.device
    if is_fitted(device):
        return ""
    return (
        f"no rates of {device.name} were fitted: the times assume that it reaches the same shares of its peak as an "
        f"{UNFITTED}"
    )


def duration(seconds: float) -> str:
    """Seconds as text in a fitting unit."""
    for unit, length in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def scaling_table(plan: Plan) -> str:
    """Tokens a second on more devices, with the same global batch (strong) and the same batch a device (weak)."""
    strong, weak = ({each.cluster.devices: each for each in scaling(plan, kind)} for kind in (True, False))
    rows = [["devices", "strong: tokens/s", "MFU", "GiB", "weak: tokens/s", "MFU", "GiB"]]
    for devices in sorted(strong | weak):
        row = [f"{devices:,}"]
        for plans in (strong, weak):
            row += _cells(plans.get(devices))
        rows.append(row)
    return aligned(rows)


def _cells(plan: Plan | None) -> list[str]:
    if plan is None:
        return ["", "", ""]
    memory = f"{plan.memory.total / GIB:.1f}"
    if not plan.fits:
        return ["does not fit", "", memory]
    return [f"{plan.time.tokens_per_second * plan.cluster.devices:,.0f}", f"{plan.time.mfu:.1%}", memory]


def reliability_lines(plan: Plan, found: Reliability) -> list[str]:
    rates = "; ".join(f"{each.per_1000_days:.2f} ({each.source})" for each in PUBLISHED)
    given = plan.run.checkpoint.every
    return [
        f"failures: one in {duration(found.between)}, {found.failures:,.1f} in the run; published failures in "
        f"1,000 days of a device: {rates}",
        f"checkpoint.every={found.every} loses least ({duration(found.every * plan.time.step)}; a save stops "
        f"training for {duration(found.stall)} and is complete after {duration(found.writing)}; a restart takes "
        f"{duration(found.restart)})" + (f"; given: {given or 'only at the end'}" if given != found.every else ""),
        f"effective training time: {found.effective:.1%}",
    ]


def loading_line(loading: Loading, devices: int) -> str:
    everything = bytes_in_words(devices * loading.rank)
    return (
        f"init_from={loading.name} has {bytes_in_words(loading.stored)} of weights: a rank reads "
        f"{bytes_in_words(loading.rank)}, and all ranks read {everything}, in {duration(loading.seconds)} at "
        f"cluster.storage={loading.storage:g} GB/s"
    )


def choice_text(choice: Choice, free: list[str]) -> str:
    best = choice.best
    rows = [[words(plan.run), *_cells(plan), f"{1000 * plan.time.step:,.0f} ms"] for plan in [best, *choice.others]]
    lines = [
        f"chosen of {choice.searched:,} settings, of which {choice.fitting:,} fit: {words(best.run, free)}",
        "",
        aligned([["settings", "tokens/s", "MFU", "GiB", "a step"], *rows]),
    ]
    if choice.against:
        lines += ["", aligned([["instead", ""], *map(list, choice.against)])]
    return "\n".join(lines)


def text(
    plan: Plan,
    choice: Choice | None,
    free: list[str],
    failures: Reliability | None,
    validation: str,
    loading: Loading | None = None,
) -> str:
    """The plan as `opt-parallel plan` prints it."""
    parts = [title(plan)]
    if choice:
        parts.append(choice_text(choice, free))
    times = [time_table(plan), speed_line(plan), rates_line(plan)]
    parts += [f"{memory_table(plan)}\n{verdict(plan)}", "\n".join(filter(None, times)), scaling_table(plan)]
    if loading:
        parts.append(loading_line(loading, plan.cluster.devices))
    if failures:
        parts.append("\n".join(reliability_lines(plan, failures)))
    return "\n\n".join([*parts, validation])


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: bytes, seconds and shares."""
    time, cluster = plan.time, plan.cluster
    return {
        "settings": settings(plan.run) | {"batch.global": plan.run.global_batch, "precision": plan.workload.precision},
        "devices": cluster.devices,
        "device": cluster.device.name,
        "rates_fitted": is_fitted(cluster.device),
        "fits": plan.fits,
        "memory": plan.memory.kinds()
        | {"total": plan.memory.total, "limit": plan.limit, "host": plan.memory.host, "peak_at": plan.memory.peak_at},
        "time": time.parts() | {"step": time.step},
        "tokens_per_second_per_device": time.tokens_per_second,
        "mfu": time.mfu,
        "hfu": time.hfu,
        "steps": plan.run.stop,
        "seconds": plan.seconds,
        "cost": plan.cost,
    }


def report(
    plan: Plan, choice: Choice | None, failures: Reliability | None, validation: str, loading: Loading | None = None
) -> dict[str, Any]:
    """All that `opt-parallel plan --json` prints."""
    curves = {
        name: [as_dict(each) for each in scaling(plan, strong)] for name, strong in (("strong", True), ("weak", False))
    }
    return {
        "plan": as_dict(plan),
        "choice": choice
        and {
            "searched": choice.searched,
            "fitting": choice.fitting,
            "others": [as_dict(each) for each in choice.others],
            "against": dict(choice.against),
        },
        "scaling": curves,
        "loading": loading and vars(loading),
        "reliability": failures and vars(failures),
        "validation": validation,
    }
