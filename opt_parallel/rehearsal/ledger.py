"""Counts the bytes of tensors and the collectives of a step on fake CUDA tensors, and finds faults of its code."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opt_parallel.parallel import compiled
from opt_parallel.parallel.topology import Group

ALIGNED = 512  # torch's allocator rounds the size of a tensor up to a multiple of this number of bytes
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
}
# where a tensor is made, by the innermost of these modules; else the backward
PLACES = {
    "VocabParallelEmbedding": "embeddings", "PositionEmbedding": "embeddings", "LayerNorm": "LayerNorms",
    "Attention": "attention", "Block": "feed-forward and residual sums", "VocabParallelHead": "loss",
    "SequenceClassifier": "loss",
}  # fmt: skip
ELSEWHERE = "gradients and the rest"


class Fault(Exception):
    """An operation that a GPU would not do, or for which the host would wait."""


@dataclass
class Trace:
    """The traced bytes of a forward and backward pass, and its collectives.

    `peaks` has the largest number of bytes that exist at the end of an operator, by operator, and `composition` those
    of the highest peak by where they are made. `held` are the bytes that exist between the forward and the backward.
    `collectives` has the number of collectives and the bytes of their full tensors, by group and kind."""

    layers: int
    held: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    saved_by_a_layer: int = 0
    composition: dict[str, int] = field(default_factory=dict)
    collectives: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def at(self) -> str:
        """The operator of the peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    def messages(self, group: str = "tensor") -> dict[str, int]:
        """The number of a group's collectives by kind."""
        return {kind: count for kind, (count, _) in self.collectives.get(group, {}).items()}

    def sent(self, group: str = "tensor") -> dict[str, int]:
        """The bytes of the full tensors of a group's collectives, by kind."""
        return {kind: size for kind, (_, size) in self.collectives.get(group, {}).items()}


class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors of `device`, and the collectives. The tensors `known` are not counted.

    `groups` are the groups of the collectives by name. If `strict`, an operator that makes a tensor on the CPU is a
    Fault, except pinned memory, copies for which the CPU does not wait, and what is computed of `known` tensors on the
    CPU, an offloaded state. A fake tensor itself refuses operators that mix devices, or that need its values on the
    CPU."""

    device, aligned = "cuda", ALIGNED

    def __init__(self, trace: Trace, known: Iterable[Tensor], groups: dict[str, Group], strict: bool = False) -> None:
        super().__init__()
        self.trace, self.now, self.most, self.strict = trace, 0, 0, strict
        self.counting, self.fused = True, False
        self.places: list[str] = []
        self.live: dict[str, int] = {}
        known = list(known)
        self.sizes: dict[int, tuple[int, str]] = dict.fromkeys((storage_of(tensor)._cdata for tensor in known), (0, ""))
        self.on_host = {storage_of(tensor)._cdata for tensor in known if tensor.device.type == "cpu"}
        self.groups = {str(group.handle.group_name): name for name, group in groups.items() if group.handle}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace in ("_c10d_functional", "c10d"):
            self._send(function.overloadpacket.__name__, args, [*_tensors((args, kwargs)), *_tensors(result)])
        if self.strict:
            self._refuse_cpu(function, args, kwargs, result)
        if self.counting and not self.fused:
            self._count(str(function), result)
        return result

    def _count(self, name: str, result: Any) -> None:
        place = self.places[-1] if self.places else ELSEWHERE
        before = self.now
        for tensor in _tensors(result):
            storage = storage_of(tensor)
            if storage._cdata in self.sizes or tensor.device.type != self.device:
                continue
            size = -(-storage.nbytes() // self.aligned) * self.aligned
            self.sizes[storage._cdata] = size, place
            self.now += size
            self.live[place] = self.live.get(place, 0) + size
            weakref.finalize(storage, self._free, storage._cdata)
        if self.now > before:
            self.trace.peaks[name] = max(self.trace.peaks.get(name, 0), self.now)
        if self.now > self.most:
            self.most, self.trace.composition = self.now, {place: size for place, size in self.live.items() if size}

    def _free(self, storage: int) -> None:
        size, place = self.sizes.pop(storage)
        self.now -= size
        self.live[place] -= size

    def _send(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        kind = next((kind for start, kind in KINDS.items() if name.replace("_", "").startswith(start)), None)
        if kind is None:
            return
        of_group = self.trace.collectives.setdefault(self._group(args), {})
        count, sent = of_group.get(kind, (0, 0))
        of_group[kind] = count + 1, sent + max(tensor.nbytes for tensor in tensors)

    def repeat(self, group: str, times: int) -> None:
        """Count the collectives of a group so far `times` times."""
        kinds = self.trace.collectives.get(group, {})
        for kind, (count, size) in kinds.items():
            kinds[kind] = count * times, size * times

    def _group(self, args: Any) -> str:
        handle = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        return "" if handle is None else self.groups.get(str(dist.ProcessGroup.unbox(handle).group_name), "")

    def _refuse_cpu(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Raise Fault if the operator made a tensor on the CPU that the host would wait for, or that a GPU cannot
        use."""
        made = [tensor for tensor in _tensors(result) if tensor.device.type != "cuda"]
        if (
            not made
            or kwargs.get("pin_memory")
            or (function.overloadpacket.__name__ == "copy_" and args[2:] == (True,))
        ):
            return
        if not any(storage_of(tensor)._cdata in self.on_host for tensor in _tensors((args, kwargs))):
            raise Fault(f"{function} makes a tensor on the device {made[0].device}")
        self.on_host |= {storage_of(tensor)._cdata for tensor in made}

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """A context in which compiled functions count as one operator, whose intermediate results need no memory."""

        def compiled_function(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.fused = True
                result = function(*args)
                self.fused = False
                if self.counting:
                    self._count(function.__name__, result)
                return result

            return call

        before = compiled._works, compiled._fast
        compiled._works = lambda device: True  # type: ignore[assignment]
        compiled._fast = compiled_function  # type: ignore[assignment]
        try:
            yield
        finally:
            compiled._works, compiled._fast = before

    @contextmanager
    def placing(self) -> Iterator[None]:
        """A context in which a tensor is attributed to the module that makes it, also in a recomputation."""

        def enter(module: Any, _: Any) -> None:
            if place := PLACES.get(type(module).__name__):
                self.places.append(place)

        def leave(module: Any, *_: Any) -> None:
            if type(module).__name__ in PLACES:
                self.places.pop()

        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def explaining_faults() -> Iterator[None]:
    """A context that turns the refusals of fake tensors into a Fault with the line of the package that caused it."""
    try:
        yield
    except Fault as fault:
        raise Fault(f"{fault}{_line_of(fault)}") from fault
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Fault(f"{error.func} makes the host wait for the device{_line_of(error)}") from error
    except RuntimeError as error:
        if "FakeTensor" not in str(error) and "devices" not in str(error):
            raise
        raise Fault(f"{str(error).partition(chr(10))[0]}{_line_of(error)}") from error


def _line_of(error: BaseException) -> str:
    """The innermost line of the network's code in an error's traceback, or nothing if autograd raised it."""
    package = Path(__file__).parents[1]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(package) and path.parent != Path(__file__).parent:
            return f", in opt_parallel/{path.relative_to(package)}, line {frame.lineno}"
    return ""


def storage_of(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
