"""The exchange over the data ranks in a rehearsed step, by ZeRO stage.

Stages 1 and 2 run the code of training. At stages 0 and 3, DeepSpeed exchanges gradients and weights, and its code
cannot run on fake tensors. So these classes follow its rules, and a test compares them with DeepSpeed's messages in a
real step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from opt_parallel.config.run import ZeroConfig
from opt_parallel.gradients import PartitionedGradients
from opt_parallel.parallel.collectives import all_gather_in_place, start_all_reduce, start_reduce_scatter
from opt_parallel.parallel.topology import Group
from opt_parallel.rehearsal.fake_cuda import DEVICE

WHOLE_BUCKET = 500_000_000  # elements of one of DeepSpeed's all-reduces at stage 0


class Partitioned(PartitionedGradients):
    """The gradients of ZeRO-1 and 2, with a list of the tensors that exist during the whole step."""

    def states(self) -> list[Tensor]:
        own = [*self.weights, *(weights.grad for weights in self.weights)]
        host = getattr(self.optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])
        return [*self.optimizer.bit16_groups_flat, *own, *host, *self.buffers]

    def exchanges(self, micros: int) -> int:
        """The number of times in a step of `micros` micro-batches that `backward` exchanges over the data ranks."""
        return micros


class _Freed:
    """Gradients that are freed as soon as they are computed, and counted. All are sent from one buffer, because the
    bytes of gradients on their way are no activations."""

    def __init__(self, model: nn.Module, data: Group) -> None:
        self.data, self.computed = data, list[int]()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._free)

    def _free(self, parameter: Tensor) -> None:
        self.computed.append(parameter.numel())
        parameter.grad = None

    def squares(self) -> Tensor:
        return torch.zeros(2, device=DEVICE)


class Whole(_Freed):
    """Stage 0: an all-reduce of all gradients after the last backward, in buckets."""

    def __init__(self, model: nn.Module, data: Group) -> None:
        super().__init__(model, data)
        self.buffer = torch.empty(sum(each.numel() for each in model.parameters()), device=DEVICE)

    def states(self) -> list[Tensor]:
        return [self.buffer]

    def exchanges(self, micros: int) -> int:
        return 1

    def backward(self, loss: Tensor, first: bool, last: bool) -> None:
        loss.backward()
        if last and self.data.size > 1:
            for elements in buckets(self.computed, WHOLE_BUCKET):
                start_all_reduce(self.buffer[:elements], self.data)()

    def update(self, factor: float) -> None: ...


class Gathered(_Freed):
    """Stage 3: weights are gathered for each use of a module, and gradients are reduced and scattered in fp32, in each
    micro-batch. Parameters of at most `zero.persistence_threshold` elements are gathered once, after the update."""

    def __init__(self, model: nn.Module, data: Group, zero: ZeroConfig, layer: int) -> None:
        super().__init__(model, data)
        self.zero, self.reuse, self.uses = zero, 2 * layer, list[list[nn.Parameter]]()
        self.kept = [each for each in model.parameters() if each.numel() <= zero.persistence_threshold]
        largest = max([zero.reduce_bucket_size, *(each.numel() for each in model.parameters())]) + data.size
        self.buffer = torch.empty(largest, device=DEVICE)
        self.weights = torch.empty(sum(map(self._padded, model.parameters())), dtype=_dtype(model), device=DEVICE)
        for module in model.modules():
            own = [each for each in module.parameters(recurse=False) if each.numel() > zero.persistence_threshold]
            if own:
                self._watch(module, own)

    def _watch(self, module: nn.Module, own: list[nn.Parameter]) -> None:
        """Note each forward and each backward of a module. A backward begins with the gradient of the output."""

        def leave(_: Any, __: Any, output: Any) -> None:
            for each in tree_leaves(output):
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(lambda gradient: self.uses.append(own))
                    return

        module.register_forward_pre_hook(lambda *_: self.uses.append(own))
        module.register_forward_hook(leave)

    def states(self) -> list[Tensor]:
        return [self.buffer, self.weights]

    def exchanges(self, micros: int) -> int:
        return micros

    def backward(self, loss: Tensor, first: bool, last: bool) -> None:
        loss.backward()
        if self.data.size == 1:
            return
        for parameters in gathers(self.uses, self.reuse):
            self._gather(parameters)
        for elements in buckets(self.computed, self.zero.reduce_bucket_size):
            part = -(-elements // self.data.size)
            start_reduce_scatter(self.buffer[: part * self.data.size].view(self.data.size, part), self.data)()

    def _gather(self, parameters: list[nn.Parameter]) -> None:
        elements = sum(map(self._padded, parameters))
        all_gather_in_place(self.weights[:elements], self.weights[: elements // self.data.size], self.data)

    def _padded(self, parameter: Tensor) -> int:
        return -(-parameter.numel() // self.data.size) * self.data.size

    def update(self, factor: float) -> None:
        if self.kept:
            self._gather(self.kept)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def buckets(sizes: list[int], most: int) -> Iterator[int]:
    """The elements of each bucket of consecutive tensors. A bucket is sent before it would exceed `most` elements."""
    elements = 0
    for size in sizes:
        if elements and elements + size > most:
            yield elements
            elements = 0
        elements += size
    if elements:
        yield elements


def gathers(uses: list[list[nn.Parameter]], reuse: int) -> Iterator[list[nn.Parameter]]:
    """The parameters that each of DeepSpeed's gathers collects, for the modules' parameters in the order of `uses`.

    After its use, a module's parameters are split again, unless they are used once more before modules of `reuse`
    elements have been used."""
    present: set[nn.Parameter] = set()
    for index, own in enumerate(uses):
        if missing := [each for each in own if each not in present]:
            yield missing
        present |= set(own)
        released, passed = set(own), 0
        for following in uses[index + 1 :]:
            if passed >= reuse or not released:
                break
            released -= set(following)
            passed += sum(each.numel() for each in following)
        present -= released
