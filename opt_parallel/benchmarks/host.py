"""Measure the time that this process itself needs to start the operations of one decoder layer, forward and backward.

On a GPU, the CPU starts operations and the GPU computes them later. If a layer's operations take longer to start than
to compute, the GPU waits. The measurement uses tensors so small that computing takes almost no time. The tensor group
is torch's `fake` process group, whose collectives return immediately. Functions that are compiled for large tensors are
compiled here too. The result is CPU time, which other programs on the machine change less than elapsed time.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel import compiled
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import fill, random_source
from opt_parallel.parallel.topology import ALONE, Group

HEAD = ["activation_checkpointing", "ms a layer (range)"]
LENGTH, SHORT, LONG = 16, 2, 10  # tokens; numbers of layers whose difference is measured


def fake_group(size: int) -> Group:
    """The first rank of a group of `size` processes that do not exist."""
    if size == 1:
        return ALONE
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    assert dist.group.WORLD is not None
    return Group(dist.group.WORLD, 0, size)


def measure(
    modes: list[ActivationCheckpointing], tensor: int, rounds: int
) -> dict[ActivationCheckpointing, list[float]]:
    """Milliseconds of CPU time for one layer, in each round, in which all modes take turns."""
    torch.set_num_threads(1)
    compiled.COMPILED_FROM = 0
    group = fake_group(tensor)
    models = {(mode, layers): _model(layers, group, mode) for mode in modes for layers in (SHORT, LONG)}
    measured: dict[ActivationCheckpointing, list[float]] = {mode: [] for mode in modes}
    for turn in range(-2, rounds):
        for mode in modes:
            short, long = (_milliseconds(models[mode, layers]) for layers in (SHORT, LONG))
            if turn >= 0:  # the first turns compile
                measured[mode].append((long - short) / (LONG - SHORT))
    return measured


def _model(layers: int, group: Group, mode: ActivationCheckpointing) -> CausalLM:
    config = ModelConfig(
        vocab_size=64 * group.size, hidden_size=8 * group.size, num_hidden_layers=layers, ffn_dim=8 * group.size,
        num_attention_heads=group.size, max_position_embeddings=LENGTH, dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(config, group, mode)
    fill(model, random_source(1), torch.device("cpu"), torch.float32)
    return model


def _milliseconds(model: CausalLM) -> float:
    ids = torch.full((1, LENGTH), 5)
    draw = Draw(seed=1, step=0, micro=0, data_rank=0, samples=torch.zeros(1, dtype=torch.int64))
    start = time.process_time()
    model(ids, ids, draw=draw).backward()
    return 1000 * (time.process_time() - start)


def row(mode: ActivationCheckpointing, times: list[float]) -> list[str]:
    return [mode.value, f"{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})"]
