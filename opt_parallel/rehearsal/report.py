"""A rehearsal as text."""

from __future__ import annotations

from opt_parallel.config.run import Run
from opt_parallel.planning.activations import activations
from opt_parallel.planning.workload import of_run
from opt_parallel.rehearsal.fake_cuda import NoFakeDevice
from opt_parallel.rehearsal.step import Rehearsal, rehearse
from opt_parallel.runtime.log import aligned

GIB = 2**30
TOLERANCE = 0.05  # the relative difference between a rehearsal and the plan from which the text says so


def text(run: Run, world: int) -> str:
    """The text about a rehearsal of the first of `world` ranks, or about what is missing for it.

    Raises: UserError if the step has a fault."""
    try:
        rehearsal = rehearse(run, world)
    except NoFakeDevice as error:
        return f"no rehearsal, so the formulas stand alone: {error}"
    return "\n".join(lines(rehearsal, activations(of_run(run, world)).total))


def lines(rehearsal: Rehearsal, planned: int) -> list[str]:
    """What a rehearsal showed. `planned` are the bytes of activations and of the loss in the plan."""
    trace = rehearsal.trace
    found = [
        f"rehearsed one step of one rank in {rehearsal.seconds:.0f} s with {rehearsal.process_memory / GIB:.1f} GiB: "
        "no tensor is on another device, and the host does not wait for the device",
        f"activations and the loss: {trace.peak / GIB:.2f} GiB at the peak, in {trace.at}; planned "
        f"{planned / GIB:.2f} GiB ({planned / trace.peak - 1:+.1%})"
        + (": the code and the formulas differ" if abs(planned / trace.peak - 1) > TOLERANCE else ""),
        "",
        aligned([["at the peak", "GiB", ""], *_rows(trace.composition, trace.peak)]),
    ]
    rows = [
        [group, kind, f"{count:,}", f"{size / GIB:.2f}"]
        for group, kinds in trace.collectives.items()
        for kind, (count, size) in kinds.items()
    ]
    if rows:
        found += ["", aligned([["group", "collective", "in a step", "GiB"], *rows])]
    return found


def _rows(sizes: dict[str, int], whole: int) -> list[list[str]]:
    largest = sorted(sizes.items(), key=lambda pair: -pair[1])
    return [[place, f"{size / GIB:.2f}", f"{size / whole:.1%}"] for place, size in largest]
