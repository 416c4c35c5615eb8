"""Chooses the dtype of a checkpoint's model in memory, and checks that the model fits into memory.

Only the headers of files are read. Without this check, Linux would kill a process that uses too much memory, and no
message would be printed."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import nn

from opt_parallel.checkpoint.sources import Opened
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.parallel.precision import device_name, native
from opt_parallel.parallel.shard import marked
from opt_parallel.parallel.topology import ALONE, DTYPES, Group, Topology
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import bytes_in_words
from opt_parallel.runtime.machine import memory_free

WORK = 2**28  # bytes that a process needs besides the weights, for activations and libraries
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Options:
    """The command-line options that set the dtype, and the tensor-parallel degree of a network, for messages."""

    dtypes: dict[torch.dtype, str]
    split: str


SCRIPT = Options({dtype: f"--dtype {str(dtype).removeprefix('torch.')}" for dtype in PRECISIONS}, "--tensor N")
RUN = Options({dtype: f"precision={precision.value}" for dtype, precision in PRECISIONS.items()}, "parallel.tensor=N")


def choose_dtype(
    opened: Opened, topology: Topology, asked: torch.dtype | None, options: Options, elements: int = 0
) -> torch.dtype:
    """The dtype of the model in memory, which is the same on every rank. Every rank must call this function.

    The result is `asked`, or else the checkpoint's own dtype. If a device only emulates the checkpoint's dtype, the
    result is float32, provided that memory suffices. `elements` is the number of values in this dtype that a rank needs
    besides the weights. Raises: UserError on every rank, if memory does not suffice."""
    own = opened.dtype
    needs = {dtype: _needed(opened, topology.tensor, dtype, elements) for dtype in PRECISIONS}
    ranks = topology.exchange((native(topology.device), needs, _free(topology)))
    emulated = {dtype for dtype, precision in PRECISIONS.items() if any(precision not in each for each, _, _ in ranks)}
    fitting = {dtype for dtype in PRECISIONS if all(needed[dtype] <= free for _, needed, free in ranks)}
    name = device_name(topology.device)
    if asked is None and own in emulated and torch.float32 in fitting:
        _note(f"{name} emulates {_name(own)}, the checkpoint's dtype: computing in float32, which is exact and faster")
        return torch.float32
    chosen = own if asked is None else asked
    if chosen not in fitting:
        rank = next(rank for rank, (_, needed, free) in enumerate(ranks) if needed[chosen] > free)
        _, needed, free = ranks[rank]
        smaller = [dtype for dtype in fitting if needed[dtype] < needed[chosen]]
        others = "".join(f"{options.dtypes[dtype]} needs {bytes_in_words(needed[dtype])}; " for dtype in smaller)
        raise UserError(
            f"{opened.folder} needs {bytes_in_words(needed[chosen])} of memory on each rank in {_name(chosen)}, but "
            f"{bytes_in_words(free)} are free on {topology.where(rank)}: {others}{options.split} splits it over N "
            f"{'GPUs' if topology.device.type == 'cuda' else 'processes, on several hosts'}",
            shared=True,
        )
    if chosen in emulated:
        _note(f"warning: {name} emulates {_name(chosen)}, many times slower than {options.dtypes[torch.float32]}")
    return chosen


def require_memory(what: str, needed: int, way_out: str) -> None:
    """Raise UserError unless `needed` + WORK bytes of memory are free."""
    free = memory_free()
    if needed + WORK > free:
        raise UserError(
            f"{what} needs {bytes_in_words(needed + WORK)} of memory, but {bytes_in_words(free)} are free: {way_out}"
        )


def network_of(opened: Opened, group: Group = ALONE) -> nn.Module:
    """This rank's part of the checkpoint's network, on the meta device, which allocates no memory."""
    with torch.device("meta"):
        if opened.is_classifier:
            return SequenceClassifier(opened.config, len(opened.labels.names), group)
        return CausalLM(opened.config, group)


def largest_parameter(opened: Opened) -> int:
    """The number of elements of the checkpoint's largest full tensor."""
    return max(shard.numel for _, _, shard in marked(network_of(opened)))


def _needed(opened: Opened, group: Group, dtype: torch.dtype, elements: int) -> int:
    """The peak memory in bytes of a rank that reads its part of the network.

    A rank needs memory for its weights and for two copies of the largest tensor, because query, key and value are read
    one by one and then stacked."""
    sizes = [math.prod(shard.local_shape) for _, _, shard in marked(network_of(opened, group))]
    return (sum(sizes) + elements) * dtype.itemsize + 2 * max(sizes) * opened.dtype.itemsize + WORK


def _free(topology: Topology) -> int:
    if topology.device.type == "cuda":
        return torch.cuda.mem_get_info(topology.device)[0]
    return memory_free(len(topology.ranks_on(topology.hosts[topology.world.rank])))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _note(text: str) -> None:
    """Print a message to standard error, because standard output is for the results."""
    if process.is_main():
        print(text, file=sys.stderr, flush=True)
