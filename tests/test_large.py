"""One block of the 175B model, really built on 8 processes: no rank holds more than its part and one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import forget_peak, peak_memory


def build_block() -> tuple[int, int, int, int, float]:
    """On the crew: peak memory before and after, bytes of the part and of its largest tensor while read, the spread."""
    from opt_parallel.config.model import ModelConfig
    from opt_parallel.model.opt import Block
    from opt_parallel.parallel.shard import fill, marked, random_source
    from opt_parallel.parallel.topology import Topology

    large = ModelConfig(hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152)
    small = ModelConfig(hidden_size=128, num_hidden_layers=96, num_attention_heads=32, ffn_dim=512)
    with Topology.open(8) as topology:
        for config in (small, large):  # the small one first, for the code and buffers that its libraries take anyway
            forget_peak()
            before = peak_memory()
            with torch.device("meta"):
                block = Block(config, 0, topology.tensor)
            fill(block, random_source(1), torch.device("cpu"), torch.bfloat16)
        after = peak_memory()
    part = sum(tensor.nbytes for tensor in block.parameters())
    largest = max(4 * tensor.numel() for _, tensor, _ in marked(block))  # drawn in fp32
    return before, after, part, largest, float(block.fc1.weight.std())


@pytest.mark.long
def test_a_175b_block_on_eight_processes(crew: Any) -> None:
    slack = 64 * 2**20  # what glibc keeps of freed memory: twice its largest mmap threshold
    whole = 12 * 12288**2 + 13 * 12288
    for before, after, part, largest, spread in crew(8)(build_block):
        assert part < 2 * whole / 8 * 1.001 + 2 * 4 * 12288 * 2
        assert after - before <= part + largest + slack, f"{after - before:,} > {part:,} + {largest:,}"
        assert abs(spread - 0.006) < 1e-4
