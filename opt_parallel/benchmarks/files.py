"""Measure memory and time of import and export. A Hugging Face folder with random weights is imported with tensor
parallelism and exported again, each in new processes. Peak memory is that of the complete process."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import ExportDtype
from opt_parallel.huggingface.config import config_for_hf
from opt_parallel.huggingface.folder import write_folder
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.shard import marked, random_source
from opt_parallel.parallel.topology import ALONE, DTYPES, Topology
from opt_parallel.report.metrics import forget_peak_memory, peak_memory
from opt_parallel.runtime.log import quiet_libraries
from opt_parallel.tools.export import export

GB = 10**9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measured:
    """The duration of one process in seconds, its peak memory in bytes, and the bound on its peak memory."""

    what: str
    seconds: float
    peak: int
    bound: int


def measure(model: ModelConfig, tensor: int, dtype: torch.dtype, shard_size: int) -> Iterator[Measured]:
    """Import an fp16 folder with files of `shard_size` bytes in `dtype` at the tensor-parallel degree `tensor`, then
    export the folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary) / "theirs", Path(temporary) / "ours"
        with torch.device("meta"):
            parameters = [(name, shard) for name, _, shard in marked(CausalLM(model, ALONE))]
        content = config_for_hf(model, torch.float16)
        write_folder(folder, content, parameters, random_source(1), torch.float16, shard_size)
        with _processes(tensor) as pool:
            store = str(Path(temporary) / "store")
            answers = [pool.submit(_import, folder, dtype, rank, tensor, store) for rank in range(tensor)]
            for rank, answer in enumerate(answers):
                seconds, peak, held = answer.result()
                yield Measured(f"import, rank {rank} of {tensor}", seconds, peak, held + GB)
        with _processes(1) as pool:
            seconds, peak = pool.submit(_export, folder, output, shard_size).result()
            yield Measured("export", seconds, peak, 2 * shard_size + GB)


@contextmanager
def _processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes. A forked process would start at the peak memory of its parent."""
    with ProcessPoolExecutor(number, multiprocessing.get_context("spawn")) as pool:
        yield pool


def _import(folder: Path, dtype: torch.dtype, rank: int, world: int, store: str) -> tuple[float, int, int]:
    """The seconds and the peak memory of an import, and the bytes of this rank's shards."""
    quiet_libraries()
    import opt_parallel.engine  # noqa: F401  training also loads DeepSpeed into memory

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=FileStore(store, world), rank=rank, world_size=world)
    with Topology.open(world) as topology:
        (seconds, peak), model = _timed(lambda: open_checkpoint(folder).model(topology.tensor, CPU, dtype))
    return seconds, peak, sum(tensor.nbytes for tensor in model.parameters())


def _export(folder: Path, output: Path, shard_size: int) -> tuple[float, int]:
    return _timed(lambda: export(folder, output, shard_size, ExportDtype.float16))[0]


def _timed(work: Callable[[], Any]) -> tuple[tuple[float, int], Any]:
    forget_peak_memory(CPU)
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start, peak_memory(CPU)), result


def row(measured: Measured) -> list[str]:
    """The table's row for one process."""
    within = "yes" if measured.peak <= measured.bound else "NO"
    return [
        measured.what, f"{measured.seconds:.1f} s", f"{measured.peak / GB:.2f} GB", f"{measured.bound / GB:.2f} GB",
        within,
    ]  # fmt: skip


def table_of(model: ModelConfig, tensor: int, precision: Any, shard_size: int) -> list[list[str]]:
    rows = [["what", "time", "peak", "bound", "within"]]
    return rows + [row(measured) for measured in measure(model, tensor, DTYPES[precision], shard_size)]
