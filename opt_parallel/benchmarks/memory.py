"""The tables of traced memory and collectives that `benchmark memory` prints and writes."""

from __future__ import annotations

from pathlib import Path

from opt_parallel.config.run import Run
from opt_parallel.rehearsal.ledger import Trace
from opt_parallel.rehearsal.trace import traces
from opt_parallel.storage.atomic import write_text

GIB = 2**30
HEAD = [
    "layers × width", "tensor", "sequence", "micro-batch", "recomputation", "precision", "peak", "saved by a layer",
    "peak at", "collectives, GiB",
]  # fmt: skip


def row(run: Run, trace: Trace) -> list[str]:
    """The cells of one run below HEAD."""
    return [
        f"{run.model.num_hidden_layers} × {run.model.hidden_size:,}", str(run.parallel.tensor), sequence(run),
        str(run.micro_batch), run.activation_checkpointing.value, run.precision.name.value,
        f"{trace.peak / GIB:.2f} GiB", f"{trace.saved_by_a_layer / 2**20:,.1f} MiB", trace.at,
        sent(trace) or "none",
    ]  # fmt: skip


def sequence(run: Run) -> str:
    """Whether the run has sequence parallelism."""
    return "yes" if run.parallel.sequence and run.parallel.tensor > 1 else "no"


def sent(trace: Trace) -> str:
    """The number and the GiB of each kind of collective."""
    sums = trace.collectives.get("tensor", {})
    return "; ".join(f"{count} {kind}, {size / GIB:.2f}" for kind, (count, size) in sums.items())


START, END = "<!-- traced -->\n", "<!-- end -->\n"
PAGE_HEAD = ["size", "tensor", "sequence", "recomputation", "peak", "÷ none", "saved by a layer", "collectives, GiB"]


def write_page(page: Path, runs: list[tuple[str, Run]]) -> None:
    """Trace named runs, and replace the table between START and END in a Markdown page.

    The first run of each name is the one that the others are compared with."""
    table, first = [PAGE_HEAD, ["---"] * len(PAGE_HEAD)], dict[str, int]()
    for (name, run), trace in zip(runs, traces([run for _, run in runs]), strict=True):
        whole = first.setdefault(name, trace.peak)
        table.append([
            name, str(run.parallel.tensor), sequence(run), run.activation_checkpointing.value,
            f"{trace.peak / GIB:.2f} GiB", f"{trace.peak / whole:.0%}", f"{trace.saved_by_a_layer / 2**20:,.1f} MiB",
            sent(trace) or "none",
        ])  # fmt: skip
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    write_text(page, f"{before}{START}{lines}{END}{rest.partition(END)[2]}")
