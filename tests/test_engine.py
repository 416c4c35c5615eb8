"""The same run in every layout: losses, gradient norms and weights of one plain process."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import STYLE_350M, Layout, assemble, micro_batches, pairwise, run_for, train, train_plainly

from opt_parallel.config.run import ActivationCheckpointing, Run, Scaler
from opt_parallel.runtime.clock import Clock

# float32 sums in another order, carried through at most four Adam steps
RELATIVE = 1e-5
STEPS = 2  # of the default tests: the first drops a layer, and ZeRO-3 prefetches in the second

LAYOUTS = [
    Layout(1, 1, 0, 1), Layout(1, 1, 0, 2, recompute="full"), Layout(2, 1, 0, 2), Layout(2, 2, 0, 1),
    Layout(4, 1, 0, 1, recompute="full"), Layout(1, 2, 0, 1),
    Layout(1, 1, 1, 2), Layout(2, 1, 1, 1), Layout(2, 2, 1, 2, recompute="full"), Layout(4, 1, 1, 2),
    Layout(1, 2, 1, 2, offload=True), Layout(2, 2, 1, 1, offload=True),
    Layout(1, 2, 2, 1), Layout(2, 1, 2, 2, recompute="full"), Layout(2, 2, 2, 1), Layout(4, 1, 2, 1, offload=True),
    Layout(2, 2, 2, 2, offload=True),
    Layout(1, 1, 3, 1), Layout(1, 2, 3, 2), Layout(2, 2, 3, 1), Layout(2, 2, 3, 2, recompute="full"),
    Layout(4, 1, 3, 2), Layout(2, 2, 3, 1, offload=True), Layout(1, 2, 3, 1, recompute="full", offload=True),
]  # fmt: skip
LAYOUTS += [
    Layout(tensor, data, stage, micro=1 + (stage + tensor + data) % 2, recompute=mode)
    for mode in ("selective", "offload") for stage in range(4) for tensor in (1, 2, 4) for data in (1, 2)
    if tensor * data <= 4
]  # fmt: skip
LAYOUTS += [
    Layout(2, 2, 0, 2, sequence=False), Layout(4, 1, 1, 1, recompute="full", sequence=False),
    Layout(2, 1, 2, 1, recompute="selective", sequence=False), Layout(2, 1, 3, 1, recompute="offload", sequence=False),
    Layout(2, 2, 3, 2, offload=True, sequence=False),
]  # fmt: skip


def small_run(layout: Layout, style: str = "standard", length: int = 16, steps: int = STEPS, batch: int = 4) -> Run:
    model = {**(STYLE_350M if style == "350m" else {}), "num_hidden_layers": 2 if steps <= STEPS else 3}
    run = run_for(layout, model, steps, batch=batch)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=length))


@functools.cache
def truth(*settings: Any) -> Any:
    return train_plainly(small_run(Layout(), *settings))


def compare(
    crew: Any, layout: Layout, style: str, steps: int = STEPS, train: Callable[..., Any] = train, length: int = 16
) -> None:
    batch = 2 if layout.data * layout.micro == 1 and steps == STEPS else 4  # at least two samples for a mean
    settings = style, length, steps, batch
    run = small_run(layout, *settings)
    answers = crew(layout.world)(train, run)
    losses, norms, weights = truth(*settings)
    for rank_losses, rank_norms, _ in answers:
        assert rank_losses == pytest.approx(losses, rel=RELATIVE)
        assert rank_norms == pytest.approx(norms, rel=RELATIVE)
    assert min(norms) > run.optimizer.clip, "clipping must be active"
    whole = assemble([parts for _, _, parts in answers])
    assert whole.keys() == weights.keys()
    for name, expected in weights.items():
        difference = float(torch.linalg.vector_norm(whole[name] - expected))
        # biases began at zero and have moved a few learning rates: they are measured against the weights beside them
        scale = max(float(torch.linalg.vector_norm(expected)), run.model.std * expected.numel() ** 0.5)
        assert difference <= RELATIVE * scale, f"{name}: {difference / scale:.1e}"


MODES = [mode.value for mode in ActivationCheckpointing]
ON_TWO = [
    # the order decides between layouts of equally many pairs, so that both axes meet each stage and recomputation
    Layout(1 + axis, 2 - axis, stage, micro, mode, offload, sequence=sequence)
    for first in (0, 1) for stage in range(4) for number, mode in enumerate(MODES) for micro in (1, 2)
    for axis in ((first + stage + number) % 2,) for offload in (False, True)[: 1 + (stage > 0)]
    for sequence in (True, False)[: 1 + axis]
]  # fmt: skip
ON_FOUR = [
    Layout(2, 2, 1, 1), Layout(2, 2, 3, 2, offload=True, sequence=False), Layout(4, 1, 2, 1, recompute="selective"),
]  # fmt: skip
FEW = [Layout(), *pairwise(ON_TWO), *ON_FOUR]


@pytest.mark.parametrize(
    ("layout", "steps"),
    [*((each, STEPS) for each in FEW), *(pytest.param(each, 4, marks=pytest.mark.long) for each in LAYOUTS)],
    ids=str,
)
def test_any_layout_is_the_run_of_one_plain_process(crew: Any, layout: Layout, steps: int) -> None:
    compare(crew, layout, "standard", steps)


@pytest.mark.parametrize(
    "layout", [Layout(2, 1, 1, 1), Layout(2, 1, 0, 2, recompute="full"), Layout(1, 2, 3, 2)], ids=str
)
def test_any_layout_in_350m_style(crew: Any, layout: Layout) -> None:
    compare(crew, layout, "350m")


@pytest.mark.parametrize(
    ("tensor", "length"),
    [(2, 13), pytest.param(4, 13, marks=pytest.mark.long), pytest.param(4, 1, marks=pytest.mark.long)],
)
def test_a_length_that_the_tensor_degree_does_not_divide(crew: Any, tensor: int, length: int) -> None:
    """Parts of 7 and 6 positions; of 4, 4, 4 and 1; of one position on one rank."""
    compare(crew, Layout(tensor, 1, 1, 2), "350m", length=length)


EVERY = [
    Layout(tensor, data, stage, 1 + (stage + tensor + data) % 2, mode, sequence=sequence)
    for tensor, data, stage, mode in itertools.product((1, 2, 4), (1, 2), range(4), MODES)
    for sequence in ((True,) if tensor == 1 else (True, False))
]


@pytest.mark.long
@pytest.mark.parametrize("style", ["standard", "350m"])
@pytest.mark.parametrize("layout", EVERY, ids=str)
def test_every_layout(crew: Any, layout: Layout, style: str) -> None:
    compare(crew, layout, style, steps=4)


def train_in_chunks(run: Any) -> Any:
    """On the crew: `train`, the loss's logits a few tokens at a time."""
    from opt_parallel.parallel import loss

    with mock.patch.dict(loss.CHUNK_BYTES, cpu=5 * 4 * -(-run.model.vocab_size // run.parallel.tensor)):
        return train(run)


def test_chunks_of_the_loss_change_nothing(crew: Any) -> None:
    """Under ZeRO-3 the head's weight is there for the forward alone, in which all chunks' gradients are formed."""
    compare(crew, Layout(2, 1, 3, 2), "standard", train=train_in_chunks)


# A reduced precision rounds each product to its mantissa, and Adam's first steps turn the sign of a small gradient into
# a whole learning rate: losses of order 6 stay within these of fp32's over eight steps, and within half of these over
# three steps.
FOLLOWS = {"bf16": 0.02, "fp16": 0.01}
# Norms carry the rounding of each gradient, and after some steps that of the weights; an error of averaging over ranks
# or micro-batches would be a factor, which Adam and clipping hide from the losses.
NORM_FOLLOWS = {"bf16": 0.05, "fp16": 0.02}


REDUCED = [
    Layout(1, 1, 1, 2, precision="bf16"),
    Layout(2, 2, 1, 2, precision="bf16"),
    Layout(1, 2, 1, 1, precision="bf16"),
    Layout(2, 1, 2, 2, precision="bf16"),
    Layout(1, 2, 2, 2, precision="bf16", offload=True),
    Layout(2, 2, 3, 4, precision="bf16"),
    Layout(2, 1, 1, 2, precision="fp16"),
    Layout(1, 2, 2, 2, precision="fp16"),
    Layout(2, 2, 3, 4, precision="fp16"),
]
FEW_REDUCED = [
    Layout(1, 2, 1, 4, precision="bf16"),
    Layout(1, 2, 2, 2, precision="bf16", offload=True),
    Layout(1, 2, 3, 2, precision="bf16"),
    Layout(2, 1, 1, 4, precision="fp16"),
]


@pytest.mark.parametrize(
    ("layout", "steps"),
    [*((each, 3) for each in FEW_REDUCED), *(pytest.param(each, 8, marks=pytest.mark.long) for each in REDUCED)],
    ids=str,
)
def test_reduced_precision_follows_fp32(crew: Any, layout: Layout, steps: int) -> None:
    answers = crew(layout.world)(train, reduced_run(layout, steps))
    losses, norms, _ = reduced_truth(steps)
    difference = FOLLOWS[layout.precision] * (1.0 if steps == 8 else 0.5)
    for rank_losses, rank_norms, _ in answers:
        assert rank_losses == pytest.approx(losses, abs=difference)
        assert rank_norms == pytest.approx(norms, rel=NORM_FOLLOWS[layout.precision])
    assemble([parts for _, _, parts in answers])  # and ranks that hold the same weights agree
    assert losses[0] - losses[-1] > 10 * difference, "the run must have learned something to follow"


def reduced_run(layout: Layout, steps: int) -> Run:
    if steps > 3:
        return run_for(layout, steps=steps, lr=2e-3)
    return run_for(layout, {"num_hidden_layers": 2}, steps, lr=5e-3)


@functools.cache
def reduced_truth(steps: int) -> Any:
    return train_plainly(reduced_run(Layout(), steps))


def diverge(run: Any) -> str:
    """On the crew: the words of the error that a weight of infinity leads to, and whether the weights stayed."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.errors import UserError

    good = random_source(run.seed)

    def source(name: str, shard: Any) -> Any:
        return good(name, shard).fill_(float("inf")) if name == "decoder.layers.0.fc2.bias" else good(name, shard)

    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, source)
        batches = micro_batches(run, 0, topology.data.rank, topology.data.size)
        try:
            engine.step(batches, Clock())
        except UserError as error:
            return str(error)
        finally:
            engine.close()
    return "went on"


@pytest.mark.parametrize(
    "layout",
    [Layout(2, 1, 0), Layout(2, 1, 1), Layout(1, 1, 1, precision="bf16"), Layout(1, 2, 3, precision="bf16")],
    ids=str,
)
def test_gradients_that_are_not_finite_end_the_run(crew: Any, layout: Layout) -> None:
    for words in crew(layout.world)(diverge, small_run(layout)):
        assert "step 1: the gradients are not finite" in words


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_growing_loss_scale_changes_nothing(crew: Any, stage: int) -> None:
    """Gradients are divided by the scale they were made with: powers of two, so to the last digit but underflow."""
    steady = run_for(Layout(2, 1, stage, 1, precision="fp16"), {"num_hidden_layers": 2}, steps=3, batch=2)
    window = dataclasses.replace(steady.precision, window=1, scaler=Scaler.standard, initial_scale=1.0)
    growing = dataclasses.replace(steady, precision=window)
    constant = crew(2)(train, steady)[0]
    found = crew(2)(train, growing)[0]
    assert found[0] == pytest.approx(constant[0], rel=1e-3)
    assert found[1] == pytest.approx(constant[1], rel=1e-2)


def left_by(run: Run) -> int:
    """The number of models and topologies that a run leaves in this process after it has closed its engine."""
    from opt_parallel.model.heads import CausalLM
    from opt_parallel.parallel.topology import Topology

    def number() -> int:
        gc.collect()
        return sum(type(each) in (CausalLM, Topology) for each in gc.get_objects())

    before = number()
    train(run)
    return number() - before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_closed_engine_frees_its_model(crew: Any, stage: int) -> None:
    """A model holds its process groups, and each group has threads. A sweep builds one engine after the other."""
    assert crew(2)(left_by, small_run(Layout(1, 2, stage), batch=2)) == [0, 0]


def gathered_after_forward(run: Run) -> list[str]:
    """On the crew: the parameters whose full values ZeRO-3 still holds between the first forward and its backward."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology

    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        gathered: dict[str, StorageWeakRef] = {}

        def watch(prefix: str, module: torch.nn.Module) -> None:
            for name, tensor in module.named_parameters(recurse=False):
                assert tensor.numel() > 0
                gathered[f"{prefix}.{name}"] = StorageWeakRef(tensor.untyped_storage())

        for prefix, module in engine.wrapped.module.named_modules():
            # DeepSpeed's hook, which gathers the parameters, was registered before this hook.
            module.register_forward_pre_hook(lambda module, _, prefix=prefix: watch(prefix, module))
        engine.wrapped.train()
        [batch] = micro_batches(run, 0, topology.data.rank, topology.data.size)
        loss = engine._loss(batch, 0, 0)
        deadline = time.monotonic() + 5.0  # gloo's thread may hold a weight for a moment after it was gathered
        while held := [name for name, storage in gathered.items() if not storage.expired()]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        assert len(gathered) > len(list(engine.wrapped.module.parameters()))  # the head's weight is the embedding's
        engine.wrapped.backward(loss)
        engine.close()
    return held


@pytest.mark.parametrize(
    ("tensor", "style", "recompute"),
    [
        (1, "standard", "none"),
        (1, "350m", "selective"),
        pytest.param(2, "350m", "none", marks=pytest.mark.long),
        pytest.param(2, "350m", "selective", marks=pytest.mark.long),
        pytest.param(2, "standard", "selective", marks=pytest.mark.long),
    ],
)
def test_zero_3_frees_each_weight_after_its_layer(crew: Any, tensor: int, style: str, recompute: str) -> None:
    model = {**(STYLE_350M if style == "350m" else {}), "layerdrop": 0.0}
    run = run_for(Layout(tensor, 2, 3, 2, recompute), model, steps=4, batch=4)
    assert crew(2 * tensor)(gathered_after_forward, run) == [[]] * 2 * tensor


def modules_on_the_stack(run: Run) -> int:
    """On the crew: the number of modules that DeepSpeed considers to be in their forward after two steps."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology

    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        for step in range(2):
            engine.step(micro_batches(run, step, 0, 1), Clock(step))
        number = len(FWD_MODULE_STACK)
        engine.close()
    return number


def test_recomputation_leaves_no_module_on_deepspeeds_stack(crew: Any) -> None:
    assert crew(1)(modules_on_the_stack, small_run(Layout(stage=3, micro=4, recompute="full"))) == [1]
