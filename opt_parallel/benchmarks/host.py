"""Measure the time that this process itself needs to start the operations of one decoder layer, forward and backward.

On a GPU, the CPU starts operations and the GPU computes them later. If a layer's operations take longer to start than
to compute, the GPU waits. The measurement uses tensors so small that computing takes almost no time. The tensor group
is torch's `fake` process group, whose collectives return immediately. Functions that are compiled for large tensors are
compiled here too. Attention seeds its generator, but computes without dropout, because attention with dropout is one
operation on a GPU and many on a CPU. The result is CPU time, because other programs on the machine affect it less than
they affect elapsed time.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.model.heads import CausalLM
from opt_parallel.model.opt import Attention
from opt_parallel.parallel import compiled
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import fill, random_source
from opt_parallel.parallel.topology import ALONE, Group

HEAD = ["activation_checkpointing", "parallel.sequence", "ms a layer (range)"]
MODES = list(ActivationCheckpointing)
LENGTH, SHORT, LONG = 16, 2, 10  # tokens; numbers of layers whose difference is measured


def fake_group(size: int) -> Group:
    """The first rank of a group of `size` processes that do not exist."""
    if size == 1:
        return ALONE
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    assert dist.group.WORLD is not None
    return Group(dist.group.WORLD, 0, size)


Variant = tuple[ActivationCheckpointing, bool]  # what is recomputed, and whether sequence parallelism is used


def measure(tensor: int, rounds: int) -> dict[Variant, list[float]]:
    """Milliseconds of CPU time for one layer, in each round, in which all variants take turns."""
    torch.set_num_threads(1)
    compiled.COMPILED_FROM = 0
    group = fake_group(tensor)
    variants = [(mode, sequence) for sequence in ([False] if tensor == 1 else [False, True]) for mode in MODES]
    depths = (SHORT, LONG)
    models = {(variant, layers): tiny_model(layers, group, *variant) for variant in variants for layers in depths}
    measured: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for turn in range(-2, rounds):
        for variant in variants:
            short, long = (_milliseconds(models[variant, layers]) for layers in (SHORT, LONG))
            if turn >= 0:  # the first turns compile
                measured[variant].append((long - short) / (LONG - SHORT))
    return measured


def tiny_model(layers: int, group: Group, mode: ActivationCheckpointing, sequence: bool) -> CausalLM:
    config = ModelConfig(
        vocab_size=64 * group.size, hidden_size=8 * group.size, num_hidden_layers=layers, ffn_dim=8 * group.size,
        num_attention_heads=group.size, max_position_embeddings=LENGTH, dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(config, group, mode, sequence)
    fill(model, random_source(1), torch.device("cpu"), torch.float32)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = partial(_attend_without_dropout, module)  # type: ignore[method-assign]
    return model


def _attend_without_dropout(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    return Attention.attend(attention, query, key, value, mask, 0.0)


def step(model: CausalLM) -> None:
    """A forward and a backward."""
    ids = torch.full((1, LENGTH), 5)
    draw = Draw(seed=1, step=0, micro=0, data_rank=0, samples=torch.zeros(1, dtype=torch.int64))
    model(ids, ids, draw=draw).backward()


def _milliseconds(model: CausalLM) -> float:
    start = time.process_time()
    step(model)
    return 1000 * (time.process_time() - start)


def row(variant: Variant, times: list[float]) -> list[str]:
    mode, sequence = variant
    spread = f"{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})"
    return [mode.value, str(sequence).lower(), spread]
