"""Measure forward and backward of the output projection and the loss, fused in our kernel and plain as in
transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.parallel.loss import vocab_parallel_linear_cross_entropy
from opt_parallel.parallel.topology import ALONE, local_device
from opt_parallel.report.metrics import forget_peak_memory, peak_memory

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_linear_cross_entropy(hidden, weight, labels, range(weight.size(0)), ALONE)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def measure(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, in which both implementations take turns. Keys that end with `memory` hold the additional
    bytes at the peak of each round."""
    device = local_device()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, generator=generator)).to(device, dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    measured: dict[str, list[float]] = {}
    for turn in range(-1, rounds):
        for loss in (fused, plain):
            seconds, memory = _once(loss, hidden, weight, labels)
            if turn >= 0:  # the first turn compiles
                measured.setdefault(loss.__name__, []).append(seconds)
                measured.setdefault(f"{loss.__name__} memory", []).append(memory)
    return measured


def _once(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, float]:
    hidden.grad = weight.grad = None
    forget_peak_memory(hidden.device)
    before = peak_memory(hidden.device)
    start = time.perf_counter()
    (loss(hidden, weight, labels) / labels.numel()).backward()
    if hidden.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, peak_memory(hidden.device) - before


def row(tokens: int, vocabulary: int, measured: dict[str, list[float]]) -> list[str]:
    """The table row for one size, with medians and ranges of the times and of the ratios of each round, and with peak
    memory."""
    ratios = [slow / fast for slow, fast in zip(measured["plain"], measured["fused"], strict=True)]
    cells = [f"{tokens:,} × {vocabulary:,}"]
    for name in ("fused", "plain"):
        times = [1000 * seconds for seconds in measured[name]]
        cells.append(f"{statistics.median(times):,.0f} ms ({min(times):,.0f}–{max(times):,.0f})")
    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
    return cells + [f"{max(measured[f'{name} memory']) / 2**20:,.0f} MiB" for name in ("fused", "plain")]
