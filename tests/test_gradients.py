"""The gradients of a step: the memory that they take, and how often the host waits for the device."""

from __future__ import annotations

import dataclasses
import gc
import threading
import traceback
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import Layout, in_bf16, micro_batches, run_for
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opt_parallel.config.run import Run
from opt_parallel.parallel import compiled
from opt_parallel.runtime.clock import Clock

WIDE = {"hidden_size": 192, "ffn_dim": 768}  # so that weights dominate activations and buffers


def bytes_alive() -> int:
    """The bytes of all tensors of this process that Python knows, each storage once. Fake tensors, which earlier
    compilations leave, have none."""
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    tensors = [each for each in found if not isinstance(each, FakeTensor) and not each.is_meta]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def bytes_in_step(run: Run) -> tuple[float, float]:
    """On the crew: bytes a parameter at the end of the last backward, and in the update, of the second step."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source, trained
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.zero import base_optimizer

    # Compiling the rounding of bf16 state would take longer than the test.
    with Topology.open(run.parallel.tensor) as topology, mock.patch.object(compiled, "COMPILED_FROM", 2**30):
        gc.collect()
        before = bytes_alive()
        engine = Engine.build(run, topology, random_source(run.seed))
        parameters = sum(getattr(each, "ds_numel", each.numel()) for _, each, _ in trained(engine.wrapped.module))
        found: dict[str, int] = {}
        first = next(each for name, each, _ in trained(engine.wrapped.module) if "embed" in name)
        for step in range(2):
            if step == 1:
                first.register_post_accumulate_grad_hook(lambda _: found.update(backward=bytes_alive() - before))
                optimizer = base_optimizer(engine.wrapped)
                optimizer.register_step_pre_hook(lambda *_: found.update(update=bytes_alive() - before))
            engine.step(micro_batches(run, step, topology.data.rank, topology.data.size), Clock(step))
        engine.close()
    return found["backward"] / parameters, found["update"] / parameters


# bf16 weights, and on two data ranks half of the fp32 weights, moments and gradients: 2 + 16 / 2. The rest is two
# buffers of 50,000 elements, 0.3 bytes a parameter, and gradients of the bucket that is being computed.
LEAN = 2 + 16 / 2


@pytest.mark.parametrize(
    ("stage", "micro", "state", "expected"),
    [
        (1, 4, "fp32", LEAN),
        (2, 2, "fp32", LEAN),
        pytest.param(1, 2, "fp32", LEAN, marks=pytest.mark.long),
        pytest.param(3, 4, "fp32", 18 / 2, marks=pytest.mark.long),
        (1, 4, "bf16", 2 + 8 / 2),  # the fp32 gradients and bf16 moments of half of the weights
        (3, 4, "bf16", 10 / 2),
    ],
)
def test_bytes_of_gradients(crew: Any, stage: int, micro: int, state: str, expected: float) -> None:
    run = run_for(Layout(1, 2, stage, micro, precision="bf16"), WIDE)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=4))
    run = in_bf16(run) if state == "bf16" else run
    for backward, update in crew(2)(bytes_in_step, run):
        assert expected < update < expected + 0.8
        assert expected < backward < expected + 0.8


class Messages(TorchDispatchMode):
    """Records the elements and dtypes of the sums and gathers of gradients and weights. Integers and scalars are left
    out."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[tuple[int, torch.dtype]] = []
        self.gathers: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [each for each in tree_leaves(arguments) if isinstance(each, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel)
            if whole.numel() > 8 and whole.is_floating_point():
                found = self.gathers if "gather" in function.__name__ else self.sums
                found.append((whole.numel(), whole.dtype))
        return function(*arguments, **(named or {}))


def messages_of_a_step(run: Run) -> tuple[int, Any, Any]:
    """On the crew: the number of parameters, and the sums and gathers of the second step."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source, trained
    from opt_parallel.parallel.topology import Topology

    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        parameters = sum(getattr(each, "ds_numel", each.numel()) for _, each, _ in trained(engine.wrapped.module))
        for step in range(2):
            messages = Messages()
            with messages:
                engine.step(micro_batches(run, step, topology.data.rank, topology.data.size), Clock(step))
        engine.close()
    return parameters, messages.sums, messages.gathers


@pytest.mark.parametrize("micros", [pytest.param(1, marks=pytest.mark.long), 2])
def test_messages_of_each_stage(crew: Any, micros: int) -> None:
    """The table of docs/performance.md: how often a step sums all gradients and gathers all weights. Gradients are
    summed in fp32, and weights are gathered in their dtype."""
    found = {}
    for stage, sums, gathers in [(0, 1, 0), (1, micros, 1), (2, micros, 1), (3, micros, 2 * micros)]:
        layout = Layout(1, 2, stage, 2 // micros, precision="fp32" if stage == 0 else "bf16")
        run = run_for(layout, {"num_hidden_layers": 4 if stage == 3 else 1, "layerdrop": 0.0}, batch=4)
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=4))
        parameters, *found[stage] = crew(2)(messages_of_a_step, run)[0]
        # The difference is padding, and at stage 3 the layer that stays gathered until its backward.
        wanted = [(sums, torch.float32), (gathers, torch.bfloat16)]
        for messages, (times, dtype) in zip(found[stage], wanted, strict=True):
            assert sum(count for count, _ in messages) / parameters == pytest.approx(times, abs=0.1), stage
            assert {each for _, each in messages} <= {dtype}, stage
    assert found[1] == found[2]


class Waits(TorchDispatchMode):
    """Counts the reads of tensors by the main thread, which would wait for a GPU. Integers and other threads' tensors
    are in the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].dtype is not torch.int64:
            self.note()
        return function(*arguments, **(named or {}))

    def note(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.places.append("".join(traceback.format_stack(limit=8)))


def waits_of_a_step(run: Run) -> list[str]:
    """On the crew: the places where the third step of a run waits for the device."""
    from deepspeed.accelerator import get_accelerator

    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology

    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        waits, tolist, cpu = Waits(), torch.Tensor.tolist, torch.Tensor.cpu

        def noted(function: Any) -> Any:
            return lambda *arguments: (waits.note(), function(*arguments))[1]

        for step in range(3):
            batches = micro_batches(run, step, topology.data.rank, topology.data.size)
            if step < 2:  # DeepSpeed's throughput timer starts to wait after two steps
                engine.step(batches, Clock(step))
                continue
            gc.collect()  # an engine of an earlier test waits for the device when it is freed
            with (
                waits,
                mock.patch.object(torch.Tensor, "tolist", noted(tolist)),
                mock.patch.object(torch.Tensor, "cpu", noted(cpu)),
                mock.patch.object(type(get_accelerator()), "synchronize", noted(type(get_accelerator()).synchronize)),
            ):
                engine.step(batches, Clock(step))
        engine.close()
    return waits.places


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, 1, 0, 2),
        Layout(2, 1, 1, 2, precision="bf16"),
        Layout(1, 2, 2, 1, precision="fp16"),
        Layout(1, 2, 3, 2, precision="fp16"),
        Layout(1, 2, 3, 2, precision="bf16", offload=True),
    ],
    ids=str,
)
def test_the_host_waits_once_in_a_step(crew: Any, layout: Layout) -> None:
    run = run_for(layout, {"num_hidden_layers": 2, "layerdrop": 0.0}, batch=4)
    for places in crew(layout.world)(waits_of_a_step, dataclasses.replace(run, steps=3)):
        assert len(places) == 1, "\n\n".join(places)


def overflow(run: Run) -> tuple[list[bool], bool, bool]:
    """On the crew: which steps overflowed, and whether the first step changed a weight, and the second one."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.zero import flat_weights

    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        skipped, changed = [], []
        for step in range(2):
            before = [each.detach().clone() for each in flat_weights(engine.wrapped, run.zero.stage)]
            batches = micro_batches(run, step, topology.data.rank, topology.data.size)
            skipped.append(engine.step(batches, Clock(step)).skipped)
            pairs = zip(before, flat_weights(engine.wrapped, run.zero.stage), strict=True)
            changed.append(any(not torch.equal(old, new) for old, new in pairs))
            assert engine.scaler is not None
            engine.scaler.scale = 16.0  # for the second step
        engine.close()
    return skipped, changed[0], changed[1]


@pytest.mark.parametrize(("stage", "micro"), [(1, 2), (2, 4), (3, 2)])
def test_an_overflow_changes_no_weight(crew: Any, stage: int, micro: int) -> None:
    """The gradients of the step that overflowed are gone in the next step."""
    run = run_for(Layout(1, 2, stage, micro, precision="fp16"), {"num_hidden_layers": 1, "layerdrop": 0.0})
    run = dataclasses.replace(run, precision=dataclasses.replace(run.precision, initial_scale=2.0**40))
    assert crew(2)(overflow, run) == [([True, False], False, True)] * 2
