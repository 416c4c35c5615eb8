"""The table of planned memory and speed of the published sizes, which `make docs` writes to docs/planning.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from opt_parallel.benchmarks.runs import PUBLISHED, composed
from opt_parallel.config.overrides import PLANNED
from opt_parallel.config.run import Precision, Run
from opt_parallel.planning.choice import choose
from opt_parallel.planning.compose import keys_from
from opt_parallel.planning.settings import ClusterConfig
from opt_parallel.runtime.errors import UserError

CLUSTERS = ("a100-80gb", "h100-80gb")
DEVICES = (1, 8, 64, 256)
GIB = 2**30
START, END = "<!-- planned -->\n", "<!-- end -->\n"
HEAD = ["size", "GPUs", *(cell for name in CLUSTERS for cell in (name, "GiB", "tokens/s a GPU", "MFU"))]


def paper_run(size: str) -> Run:
    """The run of a published size with its paper's batch, in bf16."""
    return composed([f"experiment=opt-{size}-paper"]).in_precision(Precision.bf16)


def rows(sizes: Sequence[str] = PUBLISHED) -> Iterator[list[str]]:
    """The rows of the table: the settings that `auto` chooses on a number of GPUs."""
    clusters = [keys_from([f"cluster={name}"]).cluster for name in CLUSTERS]
    for size in sizes:
        run = paper_run(size)
        for devices in DEVICES:
            cells = [cell for cluster in clusters for cell in planned(run, cluster, devices)]
            if any(cells):
                yield [size, f"{devices:,}", *cells]


def planned(run: Run, config: ClusterConfig, devices: int) -> list[str]:
    """The settings, memory, tokens/s and MFU on `devices` GPUs, empty if nothing fits."""
    gpus = min(devices, config.gpus)
    cluster = replace(config, nodes=devices // gpus, gpus=gpus).cluster()
    try:
        best = choose(run, cluster, PLANNED).best
    except UserError:
        return [""] * 4
    chosen = best.run
    settings = (
        f"tensor {chosen.parallel.tensor}, ZeRO-{chosen.zero.stage}, micro {chosen.micro_batch}, "
        f"{chosen.activation_checkpointing.value}"
    )
    time = best.time
    return [settings, f"{best.memory.total / GIB:.1f}", f"{time.tokens_per_second:,.0f}", f"{time.mfu:.0%}"]


def markdown(sizes: Sequence[str] = PUBLISHED) -> str:
    """The table in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *rows(sizes)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page(text: str) -> str:
    """The text of docs/planning.md with the table between START and END replaced."""
    before, _, rest = text.partition(START)
    return f"{before}{START}{markdown()}{END}{rest.partition(END)[2]}"
