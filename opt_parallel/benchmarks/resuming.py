"""Measure how one rank finds its part of a checkpoint that many ranks have saved with ZeRO-3. The checkpoint is made
up: its manifest, tables and headers are complete, and its values are holes in the files, which need no disk space."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from opt_parallel.checkpoint.boxes import boxes_of
from opt_parallel.checkpoint.fragments import TABLES, Fragments, Row, kinds_in, write_tables
from opt_parallel.checkpoint.manifest import FORMAT, MANIFEST, read_manifest
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.writer import rank_file
from opt_parallel.config.compose import recorded
from opt_parallel.config.run import Run
from opt_parallel.huggingface.folder import safetensors_header
from opt_parallel.model.build import network
from opt_parallel.optim import kind_of
from opt_parallel.parallel.shard import Shard, trained
from opt_parallel.parallel.topology import Group
from opt_parallel.report.metrics import forget_peak_memory, peak_memory
from opt_parallel.storage.checked import dump_checked

CPU = torch.device("cpu")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The work of one rank that resumes, and its numbers of fragments, reads and opened files."""

    layout: str
    seconds: float
    check: float  # seconds of reading the tables and checking that each element is saved once
    memory: int  # bytes of peak memory beyond the memory at the start
    fragments: int
    reads: int
    files: int


def shards_of(run: Run, tensor: int) -> list[tuple[str, Shard]]:
    """The name and mark of each trained parameter on the first of `tensor` tensor ranks."""
    model = network(run.model, run.task.lora, None, Group(None, 0, tensor))
    return [(name, shard) for name, _, shard in trained(model)]


def fragments_of(
    shards: list[tuple[str, Shard]], tensor_rank: int, data_rank: int, data: int
) -> Iterator[tuple[str, Shard, int, int]]:
    """The fragments that a rank holds under ZeRO-3: name, mark, first element and number of elements."""
    for name, shard in shards:
        own = dataclasses.replace(shard, index=tensor_rank if shard.count > 1 else 0)
        numel = math.prod(own.local_shape)
        size = -(-numel // data)
        start = data_rank * size
        if start < numel:
            yield name, own, start, min(size, numel - start)


def make(folder: Path, run: Run, tensor: int, data: int) -> None:
    """Write a checkpoint as if `tensor` × `data` ranks had saved it after a step with ZeRO-3."""
    shards, kinds = shards_of(run, tensor), ("weights", *kind_of(run.optimizer).moments)
    numbers = {name: number for number, name in enumerate(sorted(name for name, _ in shards))}
    files, tables = {}, {}
    for rank in range(tensor * data):
        saved = [
            each for each in fragments_of(shards, rank % tensor, rank // tensor, data)
            if each[1].count == tensor or rank % tensor == 0
        ]  # fmt: skip
        header = safetensors_header({f"{kind}/{name}": (n,) for name, *_, n in saved for kind in kinds}, torch.float32)
        rows: list[Row] = [(numbers[name], shard.index, start, count) for name, shard, start, count in saved]
        size = len(header) + 4 * len(kinds) * sum(count for *_, count in rows)
        with open(folder / rank_file(rank), "wb") as file:
            file.write(header)
            file.truncate(size)
        files[rank_file(rank)], tables[rank_file(rank)] = {"bytes": size, "crc32": "00000000"}, rows
    files[TABLES] = write_tables(folder / TABLES, tables)
    manifest = {
        "format": FORMAT,
        "clock": {"step": 1, "samples": 1, "tokens": 1},
        "updates": 1,
        "loss_scale": None,
        "layout": {
            "world size": tensor * data, "tensor": tensor, "data": data,
            "zero.stage": 3, "zero.offload": "none", "precision": "bf16",
        },
        "versions": {},
        "config": recorded(run),
        "tensors": {name: {"shape": list(s.shape), "dim": s.dim, "parts": s.count} for name, s in shards},
        "files": files,
    }  # fmt: skip
    (folder / MANIFEST).write_text(dump_checked(manifest))


def resume(folder: Path, run: Run, tensor: int, data: int, rank: int) -> Resumed:
    """Open a checkpoint, and plan the reads of the fragments of rank number `rank` of `tensor` × `data` ranks. The
    headers of the files are read, and no values."""
    own = list(fragments_of(shards_of(run, tensor), rank % tensor, rank // tensor, data))
    manifest = read_manifest(folder)  # also loads the libraries for it
    forget_peak_memory(CPU)
    before, start = peak_memory(CPU), time.perf_counter()
    reader = CheckpointReader(folder)
    reads = reader.plan((name, boxes_of(shard, first, count), {}) for name, shard, first, count in own)
    for file in reads:
        with reader.file(file):
            pass
    seconds, grown = time.perf_counter() - start, peak_memory(CPU) - before
    start = time.perf_counter()
    Fragments(folder, manifest, kinds_in(folder, manifest))
    check, number = time.perf_counter() - start, sum(map(len, reads.values()))
    return Resumed(f"tensor {tensor} × data {data}", seconds, check, grown, len(own), number, len(reads))


def measure(run: Run, processes: int, tensors: list[int], output: Path) -> list[list[str]]:
    """The table for a checkpoint by `processes` ranks at tensor degree `run.parallel.tensor`, which a middle rank
    resumes at each of the tensor degrees `tensors`, each in a new process."""
    lines = [["one rank resumes at", "time", "of which the check", "memory", "fragments", "reads", "files"]]
    with tempfile.TemporaryDirectory(dir=output) as folder:
        make(Path(folder), run, run.parallel.tensor, processes // run.parallel.tensor)
        for tensor in tensors:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                arguments = (Path(folder), run, tensor, processes // tensor, processes // 2)
                done = pool.submit(resume, *arguments).result()
            lines.append([
                done.layout, f"{done.seconds:.2f} s", f"{done.check:.2f} s", f"{done.memory / MIB:.0f} MiB",
                f"{done.fragments:,}", f"{done.reads:,}", str(done.files),
            ])  # fmt: skip
    return lines
