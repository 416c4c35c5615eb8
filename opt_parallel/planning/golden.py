"""Rows with the columns of tests/planning/golden.csv: arguments of Megatron-LM's functional tests, memory and times."""

from __future__ import annotations

import re
from dataclasses import replace

from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.megatron import layers_in_flight
from opt_parallel.planning.rows import (
    DETERMINISTIC,
    Cells,
    Measurement,
    Refused,
    Row,
    cluster_of,
    number,
    require_numbers,
    whole,
)
from opt_parallel.planning.timing import time_of
from opt_parallel.planning.workload import Logits, Network, Recompute, States, Trainer, Workload

COLUMNS = {"case", "platform", "num-layers", "hidden-size", "micro-batch-size", "mem_max_allocated_bytes"}
# Words of a case's name that stand for an argument which no column has.
UNKNOWN = {
    "uneven_pipeline": "the layers of each pipeline stage differ",
    "account_for_embedding": "the layers of each pipeline stage differ",
    "multi_dist_optimizer_instances": "several groups of ranks hold copies of the optimizer's state",
    "defer_embedding_wgrad": "gradients of the output projection are computed later",
    "tunable_overlap": "the schedule computes more forwards before the first backward",
    "modelopt_distill": "a second network, the teacher, is in memory",
    "mla": "multi-head latent attention has other matrices",
    "check_grads": "the number of tokens in the vocabulary is unknown",
    "moe": "experts have other matrices",
    "mtp": "further layers predict later tokens",
    "fsdp": "Megatron-FSDP splits weights and gradients too",
    "fp8": "fp8 copies of the weights are not described",
}
FUSED_LOSS = "cross_entropy_loss_fusion"
# Its network and its 192 devices are those of row G5 of published.csv. On GB200 it ran on 64, which its memory shows.
RELEASE = "gpt3_15b"
# Two workspaces of cuBLAS, of 32 MiB, and small tensors: fitted to gpt3_mcore_te_tp1_pp1 on A100. The small one is used
# where results need not be equal from run to run: fitted to gpt3_mcore_te_tp2_pp2_cp2 on A100.
WORKSPACE, SMALL_WORKSPACE = 67 * 2**20, 17 * 2**20
HOPPER = 28 * 2**20  # the workspace of Transformer Engine is 32 MiB from Hopper on, and 4 MiB before


def row(cells: Cells) -> Row:
    """The row of a table's cells. Raises: Refused."""
    case, platform = cells["case"], cells["platform"]
    for word, reason in UNKNOWN.items():
        if word in case:
            raise Refused(f"the case's name says {word}: {reason}, and no column says how")
    if "gb200" in case and "gb200" not in platform:
        raise Refused("the case is of GB200 and the platform is not: its numbers are those of the case without gb200")
    require_numbers(cells, "num-layers", "hidden-size", "num-attention-heads", "seq-length", "micro-batch-size")
    workload = _workload(cells)
    if workload.network.layers % (workload.pipeline * workload.virtual):
        raise Refused(f"{workload.network.layers} layers do not split into {workload.pipeline} × {workload.virtual}")
    named = re.search(r"[a-z]+\d{3}", platform.replace("dgx", ""))  # `lts` and `dev` alone are of A100
    cluster = cluster_of(named[0] if named else "a100", workload.devices)
    found = []
    for column, quantity in (("mem_max_allocated_bytes", "peak"), ("mem_allocated_bytes_median", "allocated")):
        # with fp16, Megatron's optimizer keeps fp32 gradients after a step, which the next step frees first
        if (value := number(cells.get(column))) and (quantity == "peak" or workload.precision == "bf16"):
            found.append(Measurement(quantity, value))
    if value := number(cells.get("iteration_s_median")):
        found.append(Measurement("iter_s", value))
    return Row(
        f"{case}/{platform}", "golden", tuple(found), workload, cluster, _no_time(case, platform, workload, cluster)
    )


def _no_time(case: str, platform: str, workload: Workload, cluster: Cluster) -> str | None:
    """Why the row's time cannot be planned, or None."""
    if "1node" in case and "gb200" in platform:
        return "one host of GB200 takes up to twenty times as long as two, and no column says why"
    if case.startswith(RELEASE):
        return "the number of devices is unknown"
    if "gb200" in platform:
        return DETERMINISTIC
    time = time_of(workload, cluster)
    if time.launching > time.step / 4:
        return "launching kernels takes longer than they do, and equal tests on equal devices differ by up to a half"
    return None


def _network(cells: Cells) -> Network:
    """An empty `vocab-size` is that of GPT-2's tokens, 50,257. An empty probability of dropout is 0.1."""
    case, hidden, length = cells["case"], whole(cells, "hidden-size", 0), whole(cells, "seq-length", 1024)
    release, gated = case.startswith(RELEASE), cells.get("swiglu") == "true"
    ffn = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden  # Megatron's default
    return Network(
        layers=whole(cells, "num-layers", 0),
        hidden=hidden,
        heads=whole(cells, "num-attention-heads", 1),
        ffn=whole(cells, "ffn-hidden-size", ffn),
        vocab=whole(cells, "vocab-size", 256000 if release else 50257),
        kv_heads=whole(cells, "num-query-groups", 0),
        gated=gated,
        tied=cells.get("untie-embeddings-and-output-weights") != "true",
        positions=0 if release or "rope" in case else length - 2,
        activation_saves_output=False,
        biases=not release and "disable_bias" not in case,
        dropout=(number(cells.get("hidden-dropout")) or 0.1) > 0 if cells.get("hidden-dropout") == "" else False,
        attention_dropout=cells.get("attention-dropout") == "",
    )


def _fused(cells: Cells) -> bool:
    """Whether attention is one kernel. An empty backend is Megatron's choice: fused, except where the library was
    older. Records of it are those of `dracooci`, if results had to be equal from run to run also those of
    `lts_dgx_a100` with at most 21 iterations, and with a fused loss those of `dev_dgx_a100`."""
    backend, case, platform = cells.get("attention-backend") or "", cells["case"], cells["platform"]
    if backend:
        return backend != "unfused"
    old = "dracooci" in platform
    if FUSED_LOSS in case:
        return not (old or platform == "dev_dgx_a100")
    old = old or (platform == "lts_dgx_a100" and whole(cells, "n_iter", 100) <= 21)
    return not (old and "reshard" not in case) and "_te_" in f"{case}_te_"


def _logits(cells: Cells) -> Logits:
    """A fused loss keeps one more fp32 tensor of the logits, and in the older library two."""
    fused, old = FUSED_LOSS in cells["case"], "dracooci" in cells["platform"]
    return Logits(6 + (4 if fused else 0) + (4 if fused and old else 0))


def _workload(cells: Cells) -> Workload:
    """The tests run on eight devices, and on one host of four where the name ends in `1node` on GB200."""
    case, platform = cells["case"], cells["platform"]
    tensor, pipeline = (whole(cells, f"{axis}-model-parallel-size", 1) for axis in ("tensor", "pipeline"))
    context, layers = whole(cells, "context-parallel-size", 1), whole(cells, "num-layers", 1)
    devices = 4 if "1node" in case and "gb200" in platform else 8
    if case.startswith(RELEASE):
        devices = 64 if "gb200" in case else 192
    data = max(1, devices // (tensor * pipeline * context))
    piece = number(cells.get("num-layers-per-virtual-pipeline-stage"))
    micro, local = whole(cells, "micro-batch-size", 1), "mcore_t" in case and "_te_" not in case
    samples = (
        number(cells["global-batch-size"]) or number(cells.get("step-batch-size-schedule", "").split(":")[-1]) or 0
    )
    if case.startswith(RELEASE):
        samples = 384  # at the beginning of the schedule, where the tests measure
    half = cells.get("bf16") != "true"  # the other tests pass --fp16
    network = _network(cells)
    workload = Workload(
        network=network,
        trainer=Trainer.megatron,
        length=whole(cells, "seq-length", 1024),
        micro=micro,
        accumulation=max(1, int(samples) // (micro * data)),
        precision="fp16" if half else "bf16",
        states=States(2, 2, 4, 8) if half else States(),
        tensor=tensor,
        sequence=cells.get("sequence-parallel") == "true" and tensor > 1,
        pipeline=pipeline,
        virtual=max(1, int(layers // pipeline // piece)) if piece else 1,
        context=context,
        data=data,
        stage=1 if cells.get("use-distributed-optimizer") == "true" else 0,
        recompute=Recompute.full if cells.get("recompute-granularity") == "full" else Recompute.none,
        flash=_fused(cells) and not local,
        logits=_logits(cells),
    )
    return replace(workload, workspace=_workspace(workload, cells, local))


def _workspace(workload: Workload, cells: Cells, local: bool) -> int:
    """Bytes of libraries. Megatron's own attention also keeps a buffer of the scores of one layer, and without Apex's
    fused softmax a copy of the scores of each layer."""
    case, platform = cells["case"], cells["platform"]
    hopper = re.search("h100|gb200", platform) is not None
    varies = ("reshard" in case or FUSED_LOSS in case) and "h100" not in platform
    free = varies or (cells.get("attention-backend") == "flash" and not hopper)
    total = (SMALL_WORKSPACE if free else WORKSPACE) + 4 * 2**20
    if not local:
        return total + (HOPPER if hopper else 0)
    copies = 1 + (layers_in_flight(workload, last=True) if "uninstall_te" in case else 0)
    scores = 2 * workload.micro * workload.network.heads * workload.length**2 // workload.tensor
    return total + round(copies * scores)
