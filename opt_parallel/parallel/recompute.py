"""Recomputation of activations in the backward pass, and storage of activations in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recomputed(
    function: Callable[..., Tensor], hidden: Tensor, *arguments: Any, inputs: HostInputs | None = None
) -> Tensor:
    """`function(hidden, *arguments)`, which keeps only `hidden` for the backward and computes the rest again.

    With `inputs`, `hidden` is kept there. The recomputation ends with the last tensor that the backward needs. So a
    product at the end of `function`, the collective that sums it, and dropout are not repeated. torch's `checkpoint`
    does the same, and takes several times as long on the host."""
    if not torch.is_grad_enabled():
        return function(hidden, *arguments)
    if torch.compiler.is_compiling():
        result = checkpoint(function, hidden, *arguments, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(result, Tensor)
        return result
    kept = (lambda: hidden) if inputs is None else inputs.keep(hidden)
    frame = _Recomputation(partial(_again, function, kept, arguments, _autocast(hidden.device.type)))
    with saved_tensors_hooks(frame.count, frame.take):
        return function(hidden, *arguments)


def _again(
    function: Callable[..., Tensor], kept: Callable[[], Tensor], arguments: tuple[Any, ...], autocast: Any
) -> None:
    with torch.enable_grad(), autocast or nullcontext():
        function(kept(), *arguments)


def _autocast(device: str) -> torch.autocast | None:
    """The autocast of the forward, under which the backward recomputes."""
    return torch.autocast(device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


class _Recomputation:
    """Numbers the tensors that a function saves for the backward, and computes them when the backward asks for one."""

    def __init__(self, again: Callable[[], None]) -> None:
        self.again, self.number, self.computed = again, 0, dict[int, Tensor]()

    def count(self, saved: Tensor) -> int:
        self.number += 1
        return self.number - 1

    def take(self, number: int) -> Tensor:
        if number not in self.computed:
            self.computed.clear()
            with suppress(_Complete), saved_tensors_hooks(self._collect, _unchanged):
                self.again()
        return self.computed.pop(number)

    def _collect(self, saved: Tensor) -> Tensor:
        tensor = self.computed[len(self.computed)] = saved.detach()
        if len(self.computed) == self.number:
            raise _Complete
        return tensor


class _Complete(Exception):
    """All tensors that the backward needs have been computed."""


def _unchanged(saved: Tensor) -> Tensor:
    return saved


def product_of_normed(norm: nn.Module, product: nn.Module, hidden: Tensor, *arguments: Any) -> Tensor:
    """`product(norm(hidden))`, which keeps `hidden` for the backward, and not the output of `norm`.

    Both also get the `arguments`. What `product` saves of this output is computed again from `hidden` when the backward
    asks for it."""
    normed = norm(hidden, *arguments)
    storage = normed.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage()._cdata == storage else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.enable_grad():  # as in the forward, because ZeRO-3 counts the inputs of `norm` that have a gradient
            return norm(hidden, *arguments).detach().view(packed)

    with saved_tensors_hooks(pack, unpack):
        result = product(normed, *arguments)
    assert isinstance(result, Tensor)
    return result


class HostInputs:
    """The inputs of one forward pass's layers, which are in the host's memory from the forward to the backward.

    On a GPU, a stream of its own copies them. An input is copied to the host while its layer computes. In the backward,
    it is copied to the device while the layer after it computes."""

    def __init__(self) -> None:
        self.last: _HostCopy | None = None

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """A function that returns `tensor`, which is in the host's memory until then."""
        self.last = _HostCopy(tensor.detach(), self.last)
        return partial(_taken, self.last, tensor.requires_grad)


def _taken(copy: _HostCopy, requires_grad: bool) -> Tensor:
    return copy.take().requires_grad_(requires_grad)


class _HostCopy:
    """A copy of a tensor in the host's memory, and `earlier`, the copy that was made before it.

    `tensor` is the tensor on its device while a copy from it or to it is under way, and else None. The current stream
    waits for such a copy before `tensor` is released. So the memory of `tensor` is reused in the order of the current
    stream, even if the host is many layers ahead of the device."""

    def __init__(self, tensor: Tensor, earlier: _HostCopy | None) -> None:
        self.earlier, self.device = earlier, tensor.device
        self.tensor: Tensor | None = tensor
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._copy(self.host, tensor)
        if earlier is not None:
            earlier._release()

    def take(self) -> Tensor:
        """The tensor on its device. The copy of the earlier tensor to the device starts too."""
        self._fetch()
        if self.earlier is not None:
            self.earlier._fetch()
        return self._release()

    def _fetch(self) -> None:
        if self.tensor is None:
            self.tensor = torch.empty_like(self.host, device=self.device, pin_memory=False)
            self._copy(self.tensor, self.host)

    def _release(self) -> Tensor:
        assert self.tensor is not None
        tensor, self.tensor = self.tensor, None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        return tensor

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Copy on the stream for copies, after all work that the current stream already has."""
        beside: AbstractContextManager[Any] = nullcontext()
        if self.device.type == "cuda":
            stream = _copying_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            beside = torch.cuda.stream(stream)
        with beside:
            target.copy_(source, non_blocking=True)
            if self.device.type == "cuda":
                self.copied = torch.cuda.current_stream(self.device).record_event()


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
