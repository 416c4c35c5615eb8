"""Measure this machine's CPUs as the devices of a plan: matrix products, memory bandwidth and memory.

`cpu_costs.py` measures the other operations of a step.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from opt_parallel.benchmarks.cpu_costs import costs, seconds_of
from opt_parallel.planning.cluster import GIB
from opt_parallel.planning.settings import ClusterConfig
from opt_parallel.rehearsal.fake_cuda import cache
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import cpu_model, cpus, memory_limit
from opt_parallel.storage.atomic import write_text

FORMAT = 3  # of the kept file
SIZES = ((128, 256), (512, 256), (512, 512), (1024, 1024))  # tokens and hidden width of the measured products
WEIGHTS = 2**23  # elements of the weights of these products, which a cache does not hold, as in a network
SMALL = range(512)  # the values of `Rates.small` that are tried
ROWS = (16, 128, 1024)  # of products in bf16
SLOW = 0.5  # seconds of a product from which larger ones are not measured, because the CPU emulates bf16


def measure(config: ClusterConfig) -> ClusterConfig:
    """`config` with measured values in place of zeros. They are kept in the user's cache for the next plan."""
    threads = max(1, cpus() // config.gpus)
    path = cache() / f"cpu-{threads}.json"
    key = f"{cpu_model()}, {threads} threads, torch {torch.__version__}, format {FORMAT}"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("key") != key:
        say(f"measuring {cpu_model()}, {threads} threads …")
        values = measured_values(threads)
        found = {"key": key, "values": values | {"bf16": emulated(torch.bfloat16) / 1e12}}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
    return filled(config, found["values"], threads)


def measured_values(threads: int) -> dict[str, Any]:
    """The values of `threads` threads, by the keys of a cluster, all but the rate in bf16."""
    torch.set_num_threads(threads)
    peak, small = peak_and_small({size: products(*size) for size in SIZES})
    bandwidth = copied()
    return {
        "fp32": peak / 1e12,
        "bandwidth": bandwidth / 1e9,
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
