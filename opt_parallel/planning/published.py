"""Rows with the columns of tests/planning/published.csv: an id, a network, a layout, and what was published of it."""

from __future__ import annotations

import re
from dataclasses import replace

from opt_parallel.planning.cluster import GIB, Cluster, Link
from opt_parallel.planning.memory import memory
from opt_parallel.planning.parameters import parameters
from opt_parallel.planning.rows import (
    DETERMINISTIC,
    NONE,
    Cells,
    Measurement,
    Refused,
    Row,
    cluster_of,
    number,
    require_numbers,
    whole,
)
from opt_parallel.planning.workload import Logits, Network, Recompute, States, Trainer, Workload

FULL = 0.9  # of the device's memory
COLUMNS = {"id", "layers", "hidden", "heads", "vocab", "seq", "gpu", "gpus", "tp", "pp", "dp_kind", "precision"}
# Bytes of a logit at the peak of the loss. KempnerForge holds the logits, their softmax and two gradients of all words
# in bf16. torchtitan of 2024 converts to fp32: logits, softmax and gradient, beside the bf16 logits; with the
# vocabulary split, five tensors in fp32 (fitted to TT10). A compiled loss keeps the logits and about their gradient
# (fitted to TT12).
KEMPNER, TITAN, TITAN_SPLIT, TITAN_COMPILED = Logits(8, False), Logits(14, True), Logits(22, True), Logits(5, True)


def row(cells: Cells) -> Row:
    """The row of a table's cells. Raises: Refused."""
    name = cells.get("id") or "?"
    source = re.sub(r"[\d.].*", "", name) or name
    require_numbers(cells, "layers", "hidden", "heads", "seq")
    count = whole(cells, "gpus", 0)
    measured = tuple(_measured(cells))
    if not measured:
        raise Refused("no cell says what was measured")
    workload = _workload(cells)
    cluster = cluster_of(cells.get("gpu") or "", count or workload.devices)
    if "Kempner" in (cells.get("source") or ""):  # hosts of four devices, every two of which have six links
        cluster = replace(cluster, per_host=min(4, count), within=Link(25e9 * 6 * max(1, workload.tensor - 1), 6e-6))
    if workload.network.layers < workload.pipeline:
        raise Refused(f"layers {workload.network.layers} are fewer than pp {workload.pipeline}")
    if workload.precision not in cluster.device.peak:
        raise Refused(f"{cluster.device.name} has no products in {workload.precision}")
    workload = _guessed(cells, workload, cluster)
    return Row(name, source, measured, workload, cluster, _no_time(cells, workload, cluster))


def network_of(cells: Cells) -> Network:
    """The network. A name with Llama has a gated feed-forward, RMSNorm, rotary positions and no biases or dropout.
    Another has none of these unless its name says so. A variant that no name says (a gate, an untied output projection)
    is the one whose number of parameters is nearest to `params`."""
    name, hidden = (cells.get("model") or "").lower(), whole(cells, "hidden", 0)
    kempner = "Kempner" in (cells.get("source") or "")
    llama = "llama" in name or kempner
    base = Network(
        layers=whole(cells, "layers", 0),
        hidden=hidden,
        heads=whole(cells, "heads", 0),
        ffn=whole(cells, "ffn", 4 * hidden),
        vocab=whole(cells, "vocab", 51200),
        kv_heads=whole(cells, "kv_heads", 0),
        gated=llama,
        tied=False,
        positions=0 if llama else whole(cells, "seq", 2048) - 2,
        activation_saves_output=False,
        biases=not llama and "no bias" not in name,
        norm=1 if llama else 2,
        dropout=not llama and "no bias" not in name,
        attention_dropout=not llama and "no bias" not in name,
    )
    text, wanted = (cells.get("params") or ""), number(cells.get("params"))
    if wanted is None:
        return base if llama else replace(base, tied=True)
    wanted *= {"t": 1e12, "m": 1e6}.get(text.strip()[-1:].lower(), 1e9)
    gates, ties = ((True, False) if kempner else (llama,)), ((False,) if llama else (False, True))
    kinds = [replace(base, tied=tied, gated=gated) for tied in ties for gated in gates]
    return min(kinds, key=lambda each: abs(parameters(each) - wanted))


def _recompute(text: str, trainer: Trainer) -> Recompute:
    """What is computed again. `selective` are operators in torch's programs and attention in Megatron-LM, where modules
    may be named instead: attention, the feed-forward (mlp), or both. Normalisations alone count as nothing."""
    text, word = text.lower(), _first_word(text)
    if "full" in text or word in ("yes", "true"):
        return Recompute.full
    if "mlp" in text:
        return Recompute.feed_forward
    if "attn" in text or "attention" in text:
        return Recompute.attention
    if "selective" in text:
        return Recompute.attention if trainer is Trainer.megatron else Recompute.operators
    if word in NONE or word[:1] == "?" or word in ("no", "off", "false") or "norm" in text:
        return Recompute.none
    raise Refused(f"the cell recompute says {text!r}: none, full, selective, core_attn and mlp are known")


def _first_word(text: str) -> str:
    return (text.lower().replace("(", " ").split() or [""])[0]


def _precision(text: str) -> str:
    """The precision of the products. An empty cell is bf16. The formats of 8 bits that scale blocks count as fp8."""
    text = text.lower().replace("float", "fp").replace("bfp", "bf")
    known = ("fp8", "bf16", "fp16", "fp32")
    found = next((each for each in known if each in text), "bf16" if text.strip() in NONE else None)
    if found is None:
        raise Refused(f"the cell precision says {text!r}: bf16, fp16, fp32 and fp8 are known")
    return found


def _data_ranks(cells: Cells, group: int, context: int) -> int:
    """The data ranks, from the number of devices if it is known. Some tables count the context ranks among them."""
    devices, given = whole(cells, "gpus", 0), whole(cells, "dp_or_fsdp", 0)
    if not devices:
        return given or 1
    if devices % group:
        raise Refused(f"gpus {devices} are not a multiple of tp × pp × cp = {group}")
    ranks = devices // group
    if given not in (0, ranks, ranks * context) and "HSDP" not in (cells.get("dp_kind") or ""):
        raise Refused(f"gpus {devices} are not tp × pp × cp × dp_or_fsdp = {group * given}")
    return ranks


def _trainer(kind: str) -> Trainer:
    if "ZeRO-3" in kind:
        return Trainer.deepspeed
    return Trainer.fsdp if "FSDP" in kind or "HSDP" in kind else Trainer.megatron


def _workload(cells: Cells) -> Workload:
    tensor, pipeline = whole(cells, "tp", 1), whole(cells, "pp", 1)
    context = whole(cells, "cp", 1)
    data = _data_ranks(cells, tensor * pipeline * context, context)
    micro, sequences = whole(cells, "micro_batch", 1), whole(cells, "global_batch_seqs", 0)
    accumulation = whole(cells, "accum", 0) or max(1, sequences // (micro * data))
    kind, precision = cells.get("dp_kind") or "", (cells.get("precision") or "bf16").lower()
    source = cells.get("source") or ""
    compiled = "yes" in (cells.get("compile") or "").lower() or "compile" in precision
    workload = Workload(
        network=network_of(cells),
        trainer=_trainer(kind),
        length=whole(cells, "seq", 2048),
        micro=micro,
        accumulation=accumulation,
        precision=_precision(precision),
        tensor=tensor,
        sequence=tensor > 1 and not (cells.get("sp") or "").lower().startswith("no"),
        pipeline=pipeline,
        virtual=whole(cells, "vp", 1) if pipeline > 1 else 1,
        context=context,
        data=data,
        stage=0 if kind in ("none", "DP", "PTD") else 1,
        lora=16 if "lora" in (cells.get("model") or "").lower() else 0,
        recompute=_recompute(cells.get("recompute") or "", _trainer(kind)),
        flash="2205.05198" not in source and "2104.04473" not in source and "2201.11990" not in source,
        compiled=compiled,
        overlap="overlap" in (cells.get("sp") or "") or "async" in precision,
    )
    return _by_source(workload, source)


def _by_source(workload: Workload, source: str) -> Workload:
    """What a program does that no column says."""
    if "Kempner" in source:
        alone, piped = workload.devices == 1, workload.pipeline > 1
        return replace(  # rank 0 writes its memory; stages of a pipeline hold whole sequences
            workload,
            stage_memory="first" if piped else "last",
            sequence=workload.sequence and not piped,
            head_split=not piped,
            states=States(2, 2 if alone or workload.accumulation == 1 else 4, 0, 4),
            logits=KEMPNER,
            embedding_split=False,
            gradients_split=workload.accumulation == 1,
            stage=3,
        )
    if "Megatron-Bridge" in source:  # its recipes sum gradients in bf16; those for long sequences overlap
        overlap = workload.length > 4096
        return replace(workload, states=States(gradient=2), reduced=2, compiled=True, overlap=overlap)
    if workload.trainer is Trainer.fsdp:
        workload, old = _local_batch(workload), "202412" in source
        logits = (TITAN_SPLIT if workload.tensor > 1 else TITAN) if old else TITAN_COMPILED
        states = States(4, 4, 0, 8)
        return replace(workload, states=states, logits=logits, stage=3, ends_gathered=True, flash2=True)
    return _by_paper(workload, source)


def _local_batch(workload: Workload) -> Workload:
    """In a pipeline, torchtitan divides the batch of a data rank into as many micro-batches as there are stages."""
    stages = workload.pipeline
    if workload.accumulation > 1 or workload.micro % stages:
        return workload
    return replace(workload, micro=workload.micro // stages, accumulation=stages)


def _by_paper(workload: Workload, source: str) -> Workload:
    if workload.trainer is Trainer.deepspeed:
        return replace(workload, stage=3, reduced=2)
    if "2201.11990" in source:  # DeepSpeed's pipeline
        return replace(workload, scattered=False)
    if "2205.05198" in source:
        return replace(workload, stage_memory="first")
    if "model_table" in source and workload.pipeline > 1:  # the table does not say how the schedule is interleaved
        return replace(workload, virtual=_pieces(workload.network.layers // workload.pipeline))
    return workload


def _pieces(layers: int) -> int:
    """The number of pieces of a pipeline stage: the largest divisor up to 8 of its layers, or each layer if there is
    none."""
    divisors = [pieces for pieces in range(2, 9) if layers % pieces == 0]
    return max(divisors, default=layers)


def _guessed(cells: Cells, workload: Workload, cluster: Cluster) -> Workload:
    """A row without its recomputation has the lightest that fits. A row without its micro-batch has 1 in a pipeline,
    and else the largest power of two up to 4 that fits."""
    modes = [workload.recompute]
    if _unsaid(cells, "recompute"):
        modes = [Recompute.none, Recompute.attention, Recompute.full]
    micros = [workload.micro]
    if number(cells.get("micro_batch")) is None and workload.pipeline == 1:
        micros = [size for size in (4, 2, 1) if workload.accumulation % size == 0]
    for mode in modes:
        for micro in micros:
            steps = workload.accumulation * workload.micro // micro
            guess = replace(workload, recompute=mode, micro=micro, accumulation=steps)
            if memory(guess, cluster).total < cluster.device.memory:
                return guess
    return replace(workload, recompute=modes[-1], micro=micros[-1])


def _unsaid(cells: Cells, column: str) -> bool:
    """Whether the cell is empty or says that it is unknown."""
    word = _first_word(cells.get(column) or "")
    return word in NONE - {"none", "-"} or word.startswith("?")


def _no_time(cells: Cells, workload: Workload, cluster: Cluster) -> str | None:
    """Why the row's time cannot be planned, or None."""
    if number(cells.get("gpus")) is None:
        return "the number of devices is unknown"
    if "rowwise" in (cells.get("precision") or ""):
        return "products in fp8 with a scale for each row have no fitted rate"
    if workload.trainer is Trainer.fsdp and workload.context > 1:
        return "torch's attention over context ranks has no fitted rate"
    if "functional_tests" in (cells.get("source") or "") and cluster.device.name.startswith("gb200"):
        return DETERMINISTIC
    used = max([each.value for each in _measured(cells) if each.quantity in ("peak", "reserved")], default=0.0)
    if used > FULL * cluster.device.memory:
        share = used / cluster.device.memory
        return f"its tensors fill {share:.0%} of the memory, so the allocator frees and asks again"
    return None


def _measured(cells: Cells) -> list[Measurement]:
    """The memory and one time of a row: the seconds of a step if given, else tokens/s, else TFLOP/s, else MFU."""
    found = []
    text, kind = cells.get("mem_gpu") or "", cells.get("mem_kind") or ""
    states, act = re.search(r"states ([\d.]+)", text), re.search(r"act ([\d.]+)", text)
    unit = GIB if "GiB" in text + kind or "Kempner" in (cells.get("source") or "") else 10**9
    if states:
        found.append(Measurement("states", float(states[1]) * unit))
    if act:
        found.append(Measurement("activations", float(act[1]) * unit))
    if "bytes" in kind:
        first, _, second = text.partition("/")
        pairs = (("allocated", number(first)), ("peak", number(second)))
        found += [Measurement(quantity, value) for quantity, value in pairs if value]
    elif (value := number(text)) and not states:
        reserved = "reserved" in kind or "torchtitan" in (cells.get("source") or "")
        found.append(Measurement("reserved" if reserved else "peak", value * unit))
    return found + _measured_time(cells)


def _measured_time(cells: Cells) -> list[Measurement]:
    devices, total = number(cells.get("gpus")), number(cells.get("tok_s_total"))
    times = {
        "iter_s": number(cells.get("iter_s")),
        "tok_s_gpu": number(cells.get("tok_s_gpu")) or (total / devices if total and devices else None),
        "tflops_gpu": number(cells.get("tflops_gpu_model")),
        "mfu_pct": number(cells.get("mfu_pct")),
    }
    quantity, value = next(((name, value) for name, value in times.items() if value), ("", 0.0))
    if quantity == "tflops_gpu" and "HARDWARE" in (cells.get("tflops_gpu_model") or ""):
        quantity = "hardware_tflops_gpu"
    return [Measurement(quantity, value)] if quantity else []
