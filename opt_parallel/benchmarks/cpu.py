"""Measure this machine's CPUs as the devices of a plan: matrix products, memory bandwidth and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from opt_parallel.planning.cluster import GIB
from opt_parallel.planning.settings import ClusterConfig
from opt_parallel.rehearsal.fake_cuda import cache
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import cpu_model, cpus, memory_limit
from opt_parallel.storage.atomic import write_text

ROUNDS, SECONDS = 3, 5.0  # of each measurement, at most
ROWS, WIDTH, WIDE = (16, 128, 1024), 1024, 4096  # products of the shape of a feed-forward layer
SLOW = 0.5  # seconds of a product from which larger ones are not measured, such as bf16 where a CPU emulates it


def measure(config: ClusterConfig) -> ClusterConfig:
    """`config` with measured values in place of zeros. They are kept in the user's cache for the next plan."""
    threads = max(1, cpus() // config.gpus)
    path = cache() / f"cpu-{threads}.json"
    key = f"{cpu_model()}, {threads} threads, torch {torch.__version__}"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("key") != key:
        say(f"measuring {key} …")
        torch.set_num_threads(threads)
        rates = {name: _product(dtype) / 1e12 for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
        found = {"key": key, "bandwidth": _bandwidth() / 1e9, **rates}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
    memory = memory_limit() / GIB
    known = {"memory": memory / config.gpus, "host_memory": memory, "device": f"{cpu_model()}, {threads} threads"}
    filled = {name: value for name, value in {**found, **known}.items() if name != "key" and not getattr(config, name)}
    return replace(config, **filled, measured=True)


def _product(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product."""
    right, rate = torch.ones(WIDTH, WIDE, dtype=dtype), 0.0
    for rows in ROWS:
        left = torch.ones(rows, WIDTH, dtype=dtype)
        seconds = _fastest(partial(torch.mm, left, right))
        rate = 2 * rows * WIDTH * WIDE / seconds
        if seconds > SLOW:
            break
    return rate


def _bandwidth() -> float:
    """Bytes/s that a copy reads and writes."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def _fastest(work: Callable[[], object]) -> float:
    """The seconds of the fastest of some calls."""
    times: list[float] = []
    while len(times) <= ROUNDS and sum(times) < SECONDS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
