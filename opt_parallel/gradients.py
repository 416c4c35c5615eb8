"""The gradients of an optimizer step under each ZeRO stage: their sum over the data ranks, their norm, and the update.

Each class has the same attributes and methods. `module` computes the forward. `averaged` is true if DeepSpeed divides
the gradients by the number of data ranks. `backward` adds the gradients of a micro-batch. After the last micro-batch,
`squares` is the sum of squares of this rank's gradients, and `update` updates the weights. No method waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opt_parallel.optim import sums_of_squares
from opt_parallel.parallel.collectives import all_gather_in_place, reduce_to
from opt_parallel.parallel.shard import trained
from opt_parallel.parallel.topology import Group


def _gradients_of(tensors: list[nn.Parameter]) -> list[Tensor]:
    """The gradients of parameters. Every trained parameter has a gradient, also in a layer that LayerDrop skips."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(gradients) == len(tensors)
    return gradients


class _AveragedGradients:
    """Gradients that DeepSpeed averages over the data ranks."""

    averaged = True

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = self.module = wrapped
        self.optimizer = wrapped.optimizer

    def backward(self, loss: Tensor, first: bool, last: bool) -> None:
        self.wrapped.backward(loss, scale_wrt_gas=False)
        if not last:
            self.wrapped.step()  # this call only counts the micro-batch


class WholeGradients(_AveragedGradients):
    """Stage 0: DeepSpeed communicates in the last backward, and each rank holds all gradients."""

    def __init__(self, wrapped: Any, data: Group) -> None:
        super().__init__(wrapped)
        self.data = data

    def squares(self) -> Tensor:
        """This rank's share of the sum of squares, see `sums_of_squares`. The sum over the data ranks is the total."""
        tensors = [tensor for _, tensor, _ in trained(self.wrapped.module)]
        pairs = zip(tensors, _gradients_of(tensors), strict=True)
        return sums_of_squares(pairs, tensors[0].device) / self.data.size

    def update(self, factor: float | None) -> None:
        """Update the weights with the gradients times `factor`. None discards the gradients."""
        assert factor is not None
        torch._foreach_mul_(_gradients_of([tensor for _, tensor, _ in trained(self.wrapped.module)]), factor)
        self.wrapped.step()


class ShardedGradients(_AveragedGradients):
    """Stage 3: DeepSpeed communicates in each backward, and each rank holds fp32 partitions."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        stream = self.optimizer.reduce_and_partition_stream
        if stream is not None:
            # DeepSpeed makes the host wait for this stream after each backward. Only the device has to wait.
            stream.synchronize = lambda: torch.cuda.current_stream().wait_stream(stream)

    def squares(self) -> Tensor:
        """The sum of squares of this rank's partition, see `sums_of_squares`."""
        optimizer, parts = self.optimizer, []
        for group, members in enumerate(optimizer.fp16_groups):
            for tensor in members:
                _, offset, count = optimizer.grad_position[optimizer.get_param_id(tensor)]
                parts.append((tensor, self._sums(group)[offset : offset + count]))
        return sums_of_squares(parts, optimizer.fp32_partitioned_groups_flat[0].device)

    def _sums(self, group: int) -> Tensor:
        """The fp32 gradients of a group's partition. Groups lie one after the other in DeepSpeed's buffer, unless the
        optimizer is offloaded."""
        optimizer = self.optimizer
        if optimizer.offload_optimizer:
            return optimizer.fp32_partitioned_groups_flat[group].grad
        sizes = [flat.numel() for flat in optimizer.fp32_partitioned_groups_flat]
        return optimizer.grad_partitions_flat_buffer[sum(sizes[:group]) :][: sizes[group]]

    def update(self, factor: float | None) -> None:
        """Update the weights with the gradients times `factor`. None discards the gradients."""
        self.optimizer.step = partial(self._update, factor)
        self.wrapped.step()

    def _update(self, factor: float | None) -> None:
        """The part of DeepSpeed's `step` that remains without its norm and its clipping, which wait for the device.
        DeepSpeed would also copy the gradients of a group before it uses them."""
        optimizer = self.optimizer
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        if factor is not None:
            for group, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
                weights.grad = self._sums(group).mul_(factor)
                optimizer._optimizer_step(group)
                if not optimizer.offload_optimizer:
                    weights.grad = None
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer._post_step(set())


@dataclass
class _Bucket:
    """Consecutive parameters of a group, with their offsets in the flat group. `missing` is the number of parameters
    without a gradient so far in this backward."""

    group: int
    start: int
    stop: int
    members: list[tuple[nn.Parameter, int]]
    missing: int = 0


@dataclass
class _Sending:
    """A sum over the data ranks that is on its way. `target` is the part of this rank's partition to which the sum is
    added, or None if another rank owns it."""

    work: Any
    values: Tensor
    target: Tensor | None
    first: bool


class PartitionedGradients:
    """Stages 1 and 2: gradients are summed over the data ranks in fp32 while the backward computes further gradients.

    DeepSpeed's optimizer holds the flat weights of each parameter group and this rank's fp32 partitions. The
    parameters of a group are divided into buckets from its end to its beginning, since the backward computes gradients
    in about this order. A bucket whose gradients are all computed is converted to fp32 and summed on the rank that owns
    it. All ranks send the buckets in the same order.

    Every micro-batch is summed into the partition, through two buffers of `bucket` elements. A single data rank adds
    its gradients to the partition directly, unless the partition is on another device.
    """

    averaged = False

    def __init__(self, module: nn.Module, optimizer: Any, data: Group, bucket: int) -> None:
        # `module` is not DeepSpeed's engine, which would prepare its own reduction of gradients in the forward.
        self.module, self.optimizer, self.data, self.size = module, optimizer, data, bucket
        flats, self.weights = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups
        largest = max(flat.numel() for flat in flats)
        self.direct = data.size == 1 and self.weights[0].device == flats[0].device
        size = 0 if self.direct else min(bucket, largest)
        self.buffers = [flats[0].new_empty(size, dtype=torch.float32) for _ in range(2)]
        for weights in self.weights:
            if weights.grad is None:  # DeepSpeed has created the gradients of an offloaded optimizer
                weights.grad = torch.zeros_like(weights, dtype=torch.float32)
        self.sending: list[list[_Sending]] = [[], []]  # for each buffer
        self.buckets = sorted(self._buckets(), key=lambda each: -each.start / flats[each.group].numel())
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks[:] = [  # DeepSpeed removes these hooks when the engine is closed
            tensor.register_post_accumulate_grad_hook(partial(self._computed, each))
            for each in self.buckets
            for tensor, _ in each.members
        ]

    def _buckets(self) -> Iterator[_Bucket]:
        for group, tensors in enumerate(self.optimizer.bit16_groups):
            stop = start = sum(tensor.numel() for tensor in tensors)
            members: list[tuple[nn.Parameter, int]] = []
            for tensor in reversed(tensors):
                start -= tensor.numel()
                members.append((tensor, start))
                if stop - start >= self.size or start == 0:
                    yield _Bucket(group, start, stop, members)
                    stop, members = start, []

    def backward(self, loss: Tensor, first: bool, last: bool) -> None:
        self.first, self.sent = first, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.members)
        loss.backward()
        assert self.sent == len(self.buckets), "a trained parameter has no gradient"
        if last:
            self._receive(0)
            self._receive(1)

    def _computed(self, bucket: _Bucket, tensor: Tensor) -> None:
        bucket.missing -= 1
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self._send(self.buckets[self.sent])
            self.sent += 1

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        parts = [gradient.reshape(-1) for gradient in _gradients_of([tensor for tensor, _ in bucket.members])]
        offsets = [offset for _, offset in bucket.members]
        if self.direct:
            own, add = self.weights[bucket.group].grad, torch._foreach_copy_ if self.first else torch._foreach_add_
            add([own[offset:][: len(part)] for offset, part in zip(offsets, parts, strict=True)], parts)
        else:
            for start in range(bucket.start, bucket.stop, self.size):
                self._send_piece(bucket, start, min(start + self.size, bucket.stop), offsets, parts)
        for tensor, _ in bucket.members:
            tensor.grad = None

    def _send_piece(self, bucket: _Bucket, start: int, stop: int, offsets: list[int], parts: list[Tensor]) -> None:
        """Send the elements from `start` to `stop` of the flat group, through the buffer that was used longest ago."""
        self._receive(0)
        self.buffers.reverse()
        self.sending.reverse()
        values, sources, targets = self.buffers[1][: stop - start], [], []
        for offset, part in zip(offsets, parts, strict=True):
            low, high = max(start, offset), min(stop, offset + len(part))
            if low < high:
                sources.append(part[low - offset : high - offset])
                targets.append(values[low - start : high - start])
        torch._foreach_copy_(targets, sources)
        self._reduce(bucket, start, values)

    def _reduce(self, bucket: _Bucket, start: int, values: Tensor) -> None:
        """Begin to sum `values`, the elements of the flat group from `start` on, each on the rank that owns it."""
        own = self.weights[bucket.group].grad
        size, stop = len(own), start + len(values)
        for owner in range(start // size, (stop - 1) // size + 1):
            low, high = max(start, owner * size), min(stop, (owner + 1) * size)
            part = values[low - start : high - start]
            target = own[low - owner * size : high - owner * size] if owner == self.data.rank else None
            self.sending[1].append(_Sending(reduce_to(part, owner, self.data), part, target, self.first))

    def _receive(self, buffer: int) -> None:
        """Let the device wait for the sums that are on their way in a buffer, and add this rank's to its partition."""
        for each in self.sending[buffer]:
            if each.work is not None:
                each.work.wait()
            if each.target is None:
                continue
            if each.first:
                each.target.copy_(each.values, non_blocking=True)
            elif each.target.device == each.values.device:
                each.target.add_(each.values)
            else:
                before = each.target.to(each.values.device, non_blocking=True)
                each.target.copy_(each.values.add_(before), non_blocking=True)
        self.sending[buffer].clear()

    def squares(self) -> Tensor:
        """The sum of squares of this rank's partition, see `sums_of_squares`."""
        parts = []
        for bucket in self.buckets:
            own = self.weights[bucket.group].grad
            for tensor, offset in bucket.members:
                low = offset - self.data.rank * len(own)
                part = own[max(low, 0) : max(low + tensor.numel(), 0)]
                if len(part):
                    parts.append((tensor, part))
        return sums_of_squares(parts, self.weights[0].device)

    @torch.no_grad()
    def update(self, factor: float | None) -> None:
        """Update the weights with the gradients times `factor`. None discards the gradients."""
        if factor is None:
            return
        torch._foreach_mul_([weights.grad for weights in self.weights], factor)
        self.optimizer.optimizer.step()
        offloaded = getattr(self.optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [None] * len(self.weights))
        for group, (weights, rounded) in enumerate(zip(self.weights, offloaded, strict=True)):
            own = self.optimizer.parallel_partitioned_bit16_groups[group][self.data.rank]
            own.copy_(weights if rounded is None else rounded.copy_(weights), non_blocking=True)
            all_gather_in_place(self.optimizer.bit16_groups_flat[group], own, self.data)
