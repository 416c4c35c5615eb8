"""Measure this machine's CPUs as the devices of a plan: matrix products, memory bandwidth, links and memory.

`cpu_costs.py` measures the other operations of a step.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from opt_parallel.benchmarks.cpu_costs import costs, seconds_of
from opt_parallel.planning.cluster import GIB
from opt_parallel.planning.settings import ClusterConfig
from opt_parallel.rehearsal.fake_cuda import cache
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import cpu_model, cpus, memory_limit
from opt_parallel.storage.atomic import write_text

FORMAT = 4  # of the kept file
SIZES = ((128, 256), (512, 256), (512, 512), (1024, 1024))  # tokens and hidden width of the measured products
WEIGHTS = 2**23  # elements of the weights of these products, which a cache does not hold, as in a network
SMALL = range(512)  # the values of `Rates.small` that are tried
ROWS = (16, 128, 1024)  # of products in bf16
MESSAGE = 2**20  # elements of a summed tensor
SLOW = 0.5  # seconds of a product from which larger ones are not measured, because the CPU emulates bf16


def measure(config: ClusterConfig) -> ClusterConfig:
    """`config` with measured values in place of zeros. They are kept in the user's cache for the next plan."""
    processes, threads = min(config.gpus, cpus()), max(1, cpus() // config.gpus)
    path = cache() / f"cpu-{processes}x{threads}.json"
    key = f"{cpu_model()}, {processes} × {threads} threads, torch {torch.__version__}, format {FORMAT}"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("key") != key:
        say(f"measuring {cpu_model()}, {processes} processes of {threads} threads …")
        values = measured_values(processes, threads)
        found = {"key": key, "values": values | {"bf16": emulated(torch.bfloat16) / 1e12}}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
    return filled(config, found["values"], threads)


def measured_values(processes: int, threads: int) -> dict[str, Any]:
    """The values of a process by the keys of a cluster, all but the rate in bf16, while `processes` compute."""
    if processes == 1:
        return values_of_one(threads)
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, spawned) as pool:
        member = partial(_member, processes, threads, str(Path(folder) / "store"))
        return _means(list(pool.map(member, range(processes))))


def _member(processes: int, threads: int, store: str, rank: int) -> dict[str, Any]:
    """The values of one of the processes, which begin together."""
    dist.init_process_group("gloo", store=FileStore(store, processes), rank=rank, world_size=processes)
    return values_of_one(threads) | link(processes)


def _means(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: _means([each[key] for each in found])
        if isinstance(value, dict)
        else statistics.fmean(each[key] for each in found)
        for key, value in found[0].items()
    }


def link(ranks: int) -> dict[str, float]:
    """GB/s and latency of messages to the other processes of this host, from all-reduces. Each is twice `ranks` - 1
    messages of a part of the tensor, as `planning.layer_time.collective` counts them. The GB/s are those of large
    messages with their latency, a small part of their time."""
    messages = 2 * (ranks - 1)
    small, large = torch.ones(ranks), torch.ones(MESSAGE)
    latency, seconds = (seconds_of(partial(dist.all_reduce, each), math.inf) / messages for each in (small, large))
    return {"within": large.nbytes / ranks / seconds / 1e9, "within_latency": 1e6 * latency}


def values_of_one(threads: int) -> dict[str, Any]:
    """The values of this process. Its links are the memory, which nothing is sent over."""
    torch.set_num_threads(threads)
    peak, small = peak_and_small({size: products(*size) for size in SIZES})
    bandwidth = copied()
    return {
        "fp32": peak / 1e12,
        "bandwidth": bandwidth / 1e9,
        "within": bandwidth / 1e9,
        "measured": {"small": small} | costs(peak, bandwidth),
    }


def filled(config: ClusterConfig, values: dict[str, Any], threads: int) -> ClusterConfig:
    """`config` with measured `values`, and the memory and name of this machine's CPU, in place of zeros."""
    memory = memory_limit() / GIB
    known = {"memory": memory / config.gpus, "host_memory": memory, "device": f"{cpu_model()}, {threads} threads"}
    return replace(config, **{name: value for name, value in (values | known).items() if not getattr(config, name)})


def products(tokens: int, width: int) -> float:
    """FLOP/s of the products of a feed-forward's first layer: the forward, and both of the backward."""
    hidden, gradient = torch.ones(tokens, width), torch.ones(tokens, 4 * width)
    weights = torch.ones(WEIGHTS // (4 * width * width), 4 * width, width)

    def work() -> None:
        for weight in weights:
            hidden @ weight.T, gradient @ weight, gradient.T @ hidden

    return 3 * 2 * tokens * weights.numel() / seconds_of(work)


def peak_and_small(rates: dict[tuple[int, int], float]) -> tuple[float, float]:
    """The peak in FLOP/s and the dim `small` that fit the `rates` of products by tokens and width best, as a plan
    computes rates: peak × Π n / (n + small) for the dims n."""

    def peaks(small: int) -> list[float]:
        """The logarithm of the peak that each rate implies."""
        dims = {size: (size[0], size[1], 4 * size[1]) for size in rates}
        return [math.log(rate) + sum(math.log1p(small / dim) for dim in dims[size]) for size, rate in rates.items()]

    small = min(SMALL, key=lambda each: statistics.pvariance(peaks(each)))
    return math.exp(statistics.fmean(peaks(small))), small


def emulated(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product, of a smaller one if the CPU emulates the dtype."""
    right, rate = torch.ones(1024, 4096, dtype=dtype), 0.0
    for rows in ROWS:
        left = torch.ones(rows, 1024, dtype=dtype)
        seconds = seconds_of(partial(torch.mm, left, right))
        rate = 2 * rows * right.numel() / seconds
        if seconds > SLOW:
            break
    return rate


def copied() -> float:
    """Bytes/s that a copy reads and writes."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
