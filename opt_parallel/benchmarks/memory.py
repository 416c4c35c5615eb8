"""Trace the memory and the collectives of a micro-batch without a GPU.

The network of a run is built of fake CUDA tensors, with a process group whose ranks do not exist. Its forward and
backward pass then allocate and free tensors as on a GPU, but nothing is computed. The traced bytes are those of
activations and temporary tensors. The bytes of weights, gradients, the optimizer's state and ZeRO's buffers are not
traced, because they follow from the number of parameters.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opt_parallel.benchmarks.fake_cuda import DEVICE, fake_tensors, group_of, load
from opt_parallel.config.run import Run
from opt_parallel.model.build import network
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel import compiled
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import Shard, fill
from opt_parallel.parallel.topology import DTYPES
from opt_parallel.storage.atomic import write_text

GIB = 2**30
ALIGNED = 512  # torch's allocator rounds the size of a tensor up to a multiple of this number of bytes
DEPTHS = (4, 6)  # a deeper network is extrapolated from networks of these numbers of layers
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "broadcast": "broadcast",
}


@dataclass
class Trace:
    """The traced bytes of a forward and backward pass of one micro-batch.

    `peaks` has the largest number of bytes that exist at the end of an operator, by operator. `held` are the bytes that
    exist between the forward and the backward. `messages` counts collectives, and `sent` sums the bytes of their full
    tensors, both by kind.
    """

    layers: int
    held: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    saved_by_a_layer: int = 0

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def at(self) -> str:
        """The operator of the peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])


class Ledger(TorchDispatchMode):
    """Counts the bytes of live CUDA tensors, and the collectives. The tensors `known` are not counted."""

    def __init__(self, trace: Trace, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.trace, self.now, self.fused = trace, 0, False
        self.sizes: dict[int, int] = dict.fromkeys((_storage(tensor)._cdata for tensor in known), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("_c10d_functional", "c10d"):
            self._send(function.overloadpacket.__name__, [*_tensors((args, kwargs)), *_tensors(result)])
        if not self.fused:
            self._count(str(function), result)
        return result

    def _count(self, name: str, result: Any) -> None:
        for tensor in _tensors(result):
            storage = _storage(tensor)
            if storage._cdata in self.sizes or tensor.device.type != "cuda":
                continue
            size = self.sizes[storage._cdata] = -(-storage.nbytes() // ALIGNED) * ALIGNED
            self.now += size
            weakref.finalize(storage, self._free, storage._cdata)
        self.trace.peaks[name] = max(self.trace.peaks.get(name, 0), self.now)

    def _free(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)

    def _send(self, name: str, tensors: list[Tensor]) -> None:
        kind = next((kind for start, kind in KINDS.items() if name.replace("_", "").startswith(start)), None)
        if kind is not None:
            self.trace.messages[kind] = self.trace.messages.get(kind, 0) + 1
            self.trace.sent[kind] = self.trace.sent.get(kind, 0) + max(tensor.nbytes for tensor in tensors)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """A context in which compiled functions count as one operator, whose intermediate results need no memory."""

        def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.fused = True
                result = function(*args)
                self.fused = False
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


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def nothing(name: str, shard: Shard) -> Tensor:
    return torch.empty([part.stop - part.start for part in shard.range])


def fake_network(run: Run) -> CausalLM:
    """This run's language model of fake CUDA tensors, as one rank of its tensor group holds it."""
    group = group_of(run.parallel.tensor)
    model = network(run.model, run.task.lora, None, group, run.activation_checkpointing, run.parallel.sequence)
    assert isinstance(model, CausalLM)
    fill(model, nothing, DEVICE, DTYPES[run.precision.name])
    return model


def micro_batch_loss(model: nn.Module, run: Run, device: torch.device) -> Tensor:
    """The loss of one micro-batch of zeros in training."""
    ids = torch.zeros(run.micro_batch, run.data.sequence_length, dtype=torch.long, device=device)
    samples = torch.zeros(run.micro_batch, dtype=torch.long, device=device)
    loss = model(ids, ids.clone(), None, None, Draw(run.seed, 0, 0, 0, samples))
    assert isinstance(loss, Tensor)
    return loss


def without_gradients(model: nn.Module) -> None:
    """Free each gradient when it is complete, as ZeRO does after it has copied the gradient."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))


def trace(run: Run, layers: int) -> Trace:
    """Trace the run's network with this number of layers. `load` must have been called in this process."""
    # LayerDrop only removes activations. Without it, all layers are equal.
    run = replace(run, model=replace(run.model, num_hidden_layers=layers, layerdrop=0.0))
    found = Trace(layers)
    with fake_tensors():
        model = fake_network(run)
        without_gradients(model)
        ledger = Ledger(found, model.parameters())
        with ledger, ledger.compiling():
            loss = micro_batch_loss(model, run, DEVICE)
            found.held = ledger.now
            (loss * 1.0).backward()
    return found


def extrapolated(run: Run) -> Trace:
    """The trace of the run's network, computed from two shallow networks. All layers allocate the same tensors, so the
    bytes at each operator grow linearly with the number of layers."""
    layers = run.model.num_hidden_layers
    low, high = trace(run, DEPTHS[0]), trace(run, DEPTHS[1])

    def at_depth(first: int, second: int) -> int:
        return second + (second - first) * (layers - high.layers) // (high.layers - low.layers)

    def each(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
        return {name: at_depth(first.get(name, 0), value) for name, value in second.items()}

    return Trace(
        layers,
        at_depth(low.held, high.held),
        each(low.peaks, high.peaks),
        each(low.messages, high.messages),
        each(low.sent, high.sent),
        (high.held - low.held) // (high.layers - low.layers),
    )


def traces(runs: list[Run]) -> list[Trace]:
    """The traces of several runs, computed in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_load_and_trace, runs).result()


def _load_and_trace(runs: list[Run]) -> list[Trace]:
    load()
    return [extrapolated(run) for run in runs]


HEAD = [
    "layers × width", "tensor", "sequence", "micro-batch", "recomputation", "precision", "peak", "saved by a layer",
    "peak at", "collectives, GiB",
]  # fmt: skip


def row(run: Run, trace: Trace) -> list[str]:
    """The cells of one run below HEAD."""
    return [
        f"{run.model.num_hidden_layers} × {run.model.hidden_size:,}", str(run.parallel.tensor), sequence(run),
        str(run.micro_batch), run.activation_checkpointing.value, run.precision.name.value,
        f"{trace.peak / GIB:.2f} GiB", f"{trace.saved_by_a_layer / 2**20:,.1f} MiB", trace.at,
        sent(trace) or "none",
    ]  # fmt: skip


def sequence(run: Run) -> str:
    """Whether the run has sequence parallelism."""
    return "yes" if run.parallel.sequence and run.parallel.tensor > 1 else "no"


def sent(trace: Trace) -> str:
    """The number and the GiB of each kind of collective."""
    return "; ".join(f"{count} {kind}, {trace.sent[kind] / GIB:.2f}" for kind, count in trace.messages.items())


START, END = "<!-- traced -->\n", "<!-- end -->\n"
PAGE_HEAD = ["size", "tensor", "sequence", "recomputation", "peak", "÷ none", "saved by a layer", "collectives, GiB"]


def write_page(page: Path, runs: list[tuple[str, Run]]) -> None:
    """Trace named runs, and replace the table between START and END in a Markdown page.

    The first run of each name is the one that the others are compared with."""
    table, first = [PAGE_HEAD, ["---"] * len(PAGE_HEAD)], dict[str, int]()
    for (name, run), trace in zip(runs, traces([run for _, run in runs]), strict=True):
        whole = first.setdefault(name, trace.peak)
        table.append([
            name, str(run.parallel.tensor), sequence(run), run.activation_checkpointing.value,
            f"{trace.peak / GIB:.2f} GiB", f"{trace.peak / whole:.0%}", f"{trace.saved_by_a_layer / 2**20:,.1f} MiB",
            sent(trace) or "none",
        ])  # fmt: skip
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    write_text(page, f"{before}{START}{lines}{END}{rest.partition(END)[2]}")
