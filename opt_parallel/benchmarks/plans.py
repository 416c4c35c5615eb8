"""The tables of planned memory and speed in docs/planning.md, which `make docs` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from opt_parallel.benchmarks.runs import PUBLISHED, composed
from opt_parallel.config.overrides import PLANNED
from opt_parallel.config.run import Precision, Run
from opt_parallel.planning.choice import choose
from opt_parallel.planning.compose import cluster_file
from opt_parallel.planning.plan import Plan, plan_of
from opt_parallel.planning.settings import ClusterConfig
from opt_parallel.runtime.errors import UserError

CLUSTERS = ("a100-80gb", "h100-80gb")
DEVICES = (1, 8, 64, 256)
GIB = 2**30
END = "<!-- end -->\n"
HEAD = ["size", "GPUs", *(cell for name in CLUSTERS for cell in (name, "GiB", "tokens/s a GPU", "MFU"))]
# cluster, hosts, devices of a host, size, global batch, further overrides
CHOICES: tuple[tuple[str, int, int, str, int, list[str]], ...] = (
    ("l4", 1, 1, "350m", 64, []),
    ("l4", 1, 1, "1.3b", 64, ["zero.offload=cpu"]),
    ("4090", 4, 1, "2.7b", 64, []),
    ("a100-40gb", 1, 8, "6.7b", 512, []),
    ("a100-80gb", 1, 8, "13b", 512, []),
    ("h100-80gb", 4, 8, "30b", 1024, []),
    ("h200-141gb", 8, 8, "66b", 1024, []),
    ("h100-80gb", 128, 8, "175b", 2048, []),
)
CHOICES_HEAD = ["cluster", "model and batch", "chosen", "MFU", "GiB", "of", "settings that fit"]
RUNS_HEAD = ["run", "settings", "MFU", "TFLOP/s of the model", "memory"]
OPT_175B = ["OPT-175B, 992 A100 80 GB (Zhang et al. 2022), published", "tensor 8, fully sharded data parallelism"]
KEMPNER = ["KempnerForge, 175B on 360 H200, published", "tensor 4 × data 90, 4,096 tokens a row, full"]
KEMPNER_KEYS = [
    "model=opt-175b", "model.max_position_embeddings=4096", "data.sequence_length=4096", "parallel.tensor=4",
    "zero.stage=3", "activation_checkpointing=full",
]  # fmt: skip
KEMPNER_BATCH = 1440


def paper_run(size: str) -> Run:
    """The run of a published size with its paper's batch, in bf16."""
    return composed([f"experiment=opt-{size}-paper"]).in_precision(Precision.bf16)


def short(run: Run) -> str:
    """The settings that `auto` chooses."""
    return (
        f"tensor {run.parallel.tensor}, ZeRO-{run.zero.stage}, micro {run.micro_batch}, "
        f"{run.activation_checkpointing.value}"
    )


def rows(sizes: Sequence[str] = PUBLISHED) -> Iterator[list[str]]:
    """The rows of the nine sizes: the settings that `auto` chooses on a number of GPUs."""
    clusters = [cluster_file(name) for name in CLUSTERS]
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
    time = best.time
    return [short(best.run), f"{best.memory.total / GIB:.1f}", f"{time.tokens_per_second:,.0f}", f"{time.mfu:.0%}"]


def choices(count: int = len(CHOICES)) -> Iterator[list[str]]:
    """The first `count` rows of the clusters on which `auto` chooses."""
    for name, hosts, gpus, size, batch, further in CHOICES[:count]:
        cluster = cluster_file(name, nodes=hosts, gpus=gpus).cluster()
        run = composed([f"model=opt-{size}", "data.sequence_length=2048", *further]).in_precision(Precision.bf16)
        choice = choose(replace(run, batch={"global": batch, "micro": 1}), cluster, PLANNED)
        best = choice.best
        where = f"{cluster.devices:,} × {cluster.device.name}"
        yield [
            where if gpus > 1 or hosts == 1 else f"{hosts} hosts of 1 × {cluster.device.name}",
            ", ".join([size, str(batch), *(f"`{key}`" for key in further)]),
            short(best.run),
            f"{best.time.mfu:.0%}",
            f"{best.memory.total / GIB:.1f}",
            f"{best.limit / GIB:.1f}",
            f"{choice.fitting} of {choice.searched}",
        ]


def published_runs() -> Iterator[list[str]]:
    """Published runs of 175 billion parameters, and plans of the same size."""
    paper, a100 = paper_run("175b"), cluster_file("a100-80gb", nodes=128).cluster()
    yield [*OPT_175B, "35%", "110.6", ""]
    yield beside_published("`experiment=opt-175b-paper` on 1,024 A100 80 GB, planned", plan_of(paper, a100))
    yield beside_published("the same with all four keys `auto`, planned", choose(paper, a100, PLANNED).best)
    yield [*KEMPNER, "47.7%", "", "53.8 GB"]
    for micro, gpus in ((16, 8), (16, 4), (8, 8)):
        run = composed(KEMPNER_KEYS).in_precision(Precision.bf16)
        run = replace(run, batch={"global": KEMPNER_BATCH, "micro": micro})
        cluster = cluster_file("h200-141gb", nodes=360 // gpus, gpus=gpus).cluster()
        yield beside_published(f"`opt-175b` on 360 H200, {gpus} a host, planned", plan_of(run, cluster))


def beside_published(what: str, plan: Plan) -> list[str]:
    time, settings = plan.time, f"{short(plan.run)}, {plan.workload.accumulation} in a step"
    flops = f"{time.model_flops / time.step / 1e12:.1f}"
    return [what, settings, f"{time.mfu:.1%}", flops, f"{plan.memory.total / GIB:.1f} GiB"]


def markdown(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *cells))


def page(text: str) -> str:
    """The text of docs/planning.md with its tables replaced, each of which is between a comment with its name and
    END."""
    tables = {
        "planned": markdown(HEAD, rows()),
        "chosen": markdown(CHOICES_HEAD, choices()),
        "published": markdown(RUNS_HEAD, published_runs()),
    }
    for name, table in tables.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}{start}{table}{END}{rest.partition(END)[2]}"
    return text
