"""The fused loss is the plain one: its value and gradients at any tensor degree, in any chunks and any precision; and
it takes the memory of a chunk, one collective a chunk, and no compiler where there is none."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command import cold_python, launch
from memory import forget_peak, peak_memory
from plain_loss import plain_linear_cross_entropy, vocab_parallel_cross_entropy
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.parallel import compiled, loss
from opt_parallel.parallel.topology import ALONE, Group

VOCABULARY, WIDTH, SHAPE = 515, 64, (3, 37)  # 515 divides by neither 2 nor 4: padded rows are in play
CHUNK, CHUNKS = 13, 9  # 111 tokens: eight chunks of 13 and one of 7
# Tokens of a chunk (None: all of them) and ranks: by default each in one test
LAYOUTS = [
    (CHUNK, 2), (None, 1),
    *(pytest.param(*each, marks=pytest.mark.long) for each in ((CHUNK, 1), (None, 2), (CHUNK, 4), (None, 4))),
]  # fmt: skip
UPSTREAM = -0.37
FAR = 960.0  # exp(960) and exp(−960) leave every dtype; fp16 still tells halves apart there

# Of a gradient's entry Σ a·b, relative to Σ |a|·|b|, in which nothing cancels. fp64 and fp32: tens of roundings, of
# logits, softmax and sums in another order. The halves, whose inputs below have exact logits: four roundings to the
# nearest, of softmax − onehot, of a chunk's product, of the sum, and of the sum times what comes in.
RELATIVE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
# What may be lost of an entry of softmax − onehot, however small it is: where the dtype's full precision ends, and half
# a step of fp16 below that, 2^−25, divided by the lift.
LEAST = {torch.float64: 2.3e-308, torch.float32: 1.2e-38, torch.bfloat16: 1.2e-38, torch.float16: 2**-35}
SUBNORMAL = 2**-24  # fp16's smallest number, and at most its rounding of what leaves a rank


def inputs(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (3, 37, D), the whole weight (V, D) and labels (3, 37), a third of which do not count: no label of
    the third chunk does, the last token's does, and so do the first and last words of all ranks.

    All kinds but "random" have logits that each dtype holds exactly, so that the truth is the truth of the same logits:
    rounded ones alone would move fp16's softmax by 1%.
    """
    generator = torch.Generator().manual_seed(5)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    labels = torch.randint(0, VOCABULARY, (111,), generator=generator)
    labels[torch.rand(111, generator=generator) < 1 / 3] = -100
    labels[2 * CHUNK : 3 * CHUNK] = -100
    labels[[0, 10, 20, 50, 60, 70, 80, 90, 100, 110]] = torch.tensor([0, 128, 129, 257, 258, 386, 387, 514, 7, 8])
    hidden, weight = whole(0, 1, *SHAPE, WIDTH), whole(-2, 2, VOCABULARY, WIDTH) / 2
    match kind:
        case "random" | "no labels":
            hidden = torch.randn(*SHAPE, WIDTH, dtype=torch.float64, generator=generator)
            weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=generator) * 0.2
            labels = labels if kind == "random" else torch.full_like(labels, -100)
        case "exact":
            pass
        case "far above" | "far below":
            hidden[..., 0], weight[:, 0] = 1.0, FAR if kind == "far above" else -FAR
        case "far apart":
            hidden, weight = whole(-2, 2, *SHAPE, WIDTH), 32 * whole(-3, 3, VOCABULARY, WIDTH)
        case "confident":  # the label's logit is 18, all others' are 0 to 2: of softmax they get about 1e-7 each
            named = torch.arange(111) % 32
            hidden, weight = 2 * F.one_hot(named, WIDTH).double().view(*SHAPE, WIDTH), whole(0, 2, VOCABULARY, WIDTH)
            weight /= 2
            weight[torch.arange(32), torch.arange(32)] = 9.0
            labels = torch.where(labels == -100, labels, named)
        case "wrong":  # one label throughout, never likely: the sums over tokens and words are as large as they can be
            hidden[..., 0], hidden[..., 1], labels[:] = 1.0, 0.0, 3
            weight[3] = -1.0
            weight[3, 1] = 128.0
    return hidden.to(dtype), weight.to(dtype), labels.view(SHAPE)


def words_of(rank: int, size: int) -> range:
    rows = -(-VOCABULARY // size)
    return range(rank * rows, min((rank + 1) * rows, VOCABULARY))


def part_of(weight: Tensor, rank: int, size: int) -> Tensor:
    """A rank's rows; what its padded ones hold must not matter, so that they hold much."""
    words, rows = words_of(rank, size), -(-VOCABULARY // size)
    return torch.cat([weight[words.start : words.stop], weight.new_full((rows - len(words), WIDTH), 100.0)])


def in_chunks(tokens: int | None, size: int, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A context in which a chunk has that many tokens and a block of the weight's gradient 100 rows; or all of them."""
    if tokens is None:
        return nullcontext()
    rows = -(-VOCABULARY // size)
    return mock.patch.multiple(loss, CHUNK_BYTES={"cpu": tokens * rows * dtype.itemsize}, ROWS={"cpu": 100})


def leaves(kind: str, dtype: torch.dtype, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor, Tensor, range]:
    hidden, weight, labels = inputs(kind, dtype)
    return hidden.requires_grad_(), part_of(weight, rank, size).requires_grad_(), labels, words_of(rank, size)


def fused(
    kind: str, dtype: torch.dtype, size: int, chunk: int | None, upstream: float = UPSTREAM
) -> tuple[Tensor, Tensor, Tensor]:
    """On the crew: the loss, this rank's summand of the hidden states' gradient, its rows of the weight's."""
    from opt_parallel.parallel.topology import Topology

    with Topology.open(size) as topology, in_chunks(chunk, size, dtype):
        hidden, weight, labels, words = leaves(kind, dtype, topology.tensor.rank, size)
        value = loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, topology.tensor)
        value.backward(torch.tensor(upstream, dtype=value.dtype))
        assert hidden.grad is not None
        assert weight.grad is not None
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, dtype)
        return value.detach(), hidden.grad, weight.grad


def check(
    answers: list[tuple[Tensor, Tensor, Tensor]], kind: str, dtype: torch.dtype, upstream: float = UPSTREAM
) -> None:
    """Hold what the ranks found to the truth: the plain loss of the same inputs, on one process in fp64."""
    hidden, weight, labels = inputs(kind, dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = F.linear(hidden, weight)
    logits.retain_grad()
    value = vocab_parallel_cross_entropy(logits, labels, 0, VOCABULARY, ALONE)
    value.backward(torch.tensor(upstream, dtype=torch.float64))
    assert logits.grad is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    # where a token is all but certain, its logarithm and its 1 − softmax lose some of fp32's roundings of 1
    exact = RELATIVE[torch.promote_types(dtype, torch.float32)]
    of_label = exact * abs(upstream) * (logits.grad * upstream < 0)
    for found, _, _ in answers:
        assert torch.equal(found, answers[0][0]), "the ranks disagree about the loss"
        assert found.item() == pytest.approx(value.item(), rel=exact, abs=exact * labels.numel())
    size, absolute = len(answers), SUBNORMAL if dtype is torch.float16 else 0.0
    found_hidden = torch.stack([gradient.double() for _, gradient, _ in answers]).sum(0)
    lost = RELATIVE[dtype] * logits.grad.abs() + LEAST[dtype] * abs(upstream) + of_label
    hold(found_hidden, hidden.grad, lost @ weight.detach().abs() + size * absolute)
    lost_by_weight = lost.flatten(0, 1).T @ hidden.detach().abs().flatten(0, 1)
    for rank, (_, _, gradient) in enumerate(answers):
        words = words_of(rank, size)
        real = slice(words.start, words.stop)
        hold(gradient[: len(words)].double(), weight.grad[real], lost_by_weight[real] + absolute)
        assert not gradient[len(words) :].any(), "a padded row has a gradient"


def hold(found: Tensor, truth: Tensor, tolerance: Tensor) -> None:
    assert found.shape == truth.shape
    assert bool(found.isfinite().all())
    error = (found - truth).abs()
    within = bool((error <= tolerance).all())
    assert within, f"off by {float((error / tolerance).nan_to_num().max()):.3g} times what is tolerated"


def test_the_plain_loss_is_torchs_own() -> None:
    """What all others are held to, in fp64: sums in another order."""
    hidden, weight, labels, words = leaves("random", torch.float64)
    value = plain_linear_cross_entropy(hidden, weight, labels, words, ALONE)
    expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0.0)
    for found, truth in zip(
        torch.autograd.grad(value, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunk", "size"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["random", "no labels"])
def test_equals_the_plain_loss(crew: Any, kind: str, chunk: int | None, dtype: torch.dtype, size: int) -> None:
    check(crew(size)(fused, kind, dtype, size, chunk), kind, dtype)


@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [
        pytest.param(kind, dtype, size, marks=[pytest.mark.long] * (size != 1 + (row + column) % 2))
        for row, kind in enumerate(("far above", "far below", "far apart"))
        for column, dtype in enumerate((torch.float16, torch.float32, torch.float64))
        for size in (1, 2, 4)
    ],
)
def test_is_stable_at_large_logits_and_small_upstream(crew: Any, kind: str, dtype: torch.dtype, size: int) -> None:
    check(crew(size)(fused, kind, dtype, size, CHUNK, 1e-4), kind, dtype, 1e-4)


@pytest.mark.parametrize(("chunk", "size"), LAYOUTS[:4])
@pytest.mark.parametrize(
    ("kind", "upstream"), [("exact", 2.0**10), ("exact", 2.0**-5), ("confident", 2.0**10), ("wrong", 2.0**-5)]
)
def test_fp16_is_within_its_rounding(crew: Any, kind: str, upstream: float, chunk: int | None, size: int) -> None:
    """Whatever the loss scale. "wrong" makes sums that leave fp16 before they are multiplied by what comes in."""
    check(crew(size)(fused, kind, torch.float16, size, chunk, upstream), kind, torch.float16, upstream)


def test_fp16_keeps_what_it_cannot_hold(crew: Any) -> None:
    """Softmax entries that are 0 in fp16 are none once multiplied by the loss scale. Those of words that are no label
    only add up, so that each entry of their gradient is as near as four roundings, and as two of a lifted entry just
    below fp16's full precision: 2^−25 of 2^10 · 1.5e-8 is another four."""
    hidden, weight, labels, _ = leaves("confident", torch.float64)
    softmax = F.linear(hidden, weight).softmax(-1).detach()
    assert float(softmax[..., 32:].max()) < 1.3e-7
    assert bool((softmax[..., 32:].half() == 0).any()), "fp16 holds them"
    [(_, _, gradient)] = crew(1)(fused, "confident", torch.float16, 1, CHUNK, 2.0**10)
    loss_of_all = vocab_parallel_cross_entropy(F.linear(hidden, weight), labels, 0, VOCABULARY, ALONE)
    loss_of_all.backward(torch.tensor(2.0**10, dtype=torch.float64))
    assert weight.grad is not None
    assert torch.equal(gradient[32:] > 0, weight.grad[32:] > 0)
    torch.testing.assert_close(gradient[32:].double(), weight.grad[32:], rtol=2 * RELATIVE[torch.float16], atol=0.0)


@pytest.mark.parametrize(("chunk", "size"), LAYOUTS)
@pytest.mark.parametrize("kind", ["exact", "confident", "wrong"])
def test_bf16_is_within_its_rounding(crew: Any, kind: str, chunk: int | None, size: int) -> None:
    check(crew(size)(fused, kind, torch.bfloat16, size, chunk), kind, torch.bfloat16)


def fused_and_compiled(kind: str, dtype: torch.dtype, chunk: int) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
    """On a crew of one: how often a compiled function was called, and what `fused` returns."""
    fast = mock.patch.object(compiled, "_fast", wraps=compiled._fast)
    with mock.patch.object(compiled, "COMPILED_FROM", 0), fast as calls:
        answer = fused(kind, dtype, 1, chunk)
    return calls.call_count, answer


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("kind", "dtype", "chunk"),
    [
        ("random", torch.float32, 37),  # all chunks are of one length, so each function is compiled once
        pytest.param("random", torch.float32, CHUNK, marks=pytest.mark.long),
        pytest.param("exact", torch.bfloat16, CHUNK, marks=pytest.mark.long),
    ],
)
def test_compiled_it_equals_the_plain_loss(crew: Any, kind: str, dtype: torch.dtype, chunk: int) -> None:
    [(calls, answer)] = crew(1)(fused_and_compiled, kind, dtype, chunk)
    assert calls > 0, "nothing was compiled"
    check([answer], kind, dtype)


def print_two_losses() -> None:
    """In a process of its own, without a compiler."""
    torch._inductor.config.cpp.cxx = ("/nonexistent/g++",)
    with mock.patch.object(compiled, "COMPILED_FROM", 0), in_chunks(CHUNK, 1, torch.float64):
        hidden, weight, labels, words = leaves("random", torch.float64)
        for _ in range(2):
            value = loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, ALONE)
            value.backward()
            print(json.dumps(value.item()))


def alone(function: str, *arguments: str, **env: str) -> list[str]:
    """What a function of this file prints in a process of its own, line by line."""
    process = launch(1, "tests/support/call.py", __file__, function, *arguments, **env)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_without_a_compiler_it_says_so_and_works(tmp_path: Path) -> None:
    said, *losses = alone("print_two_losses", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert said.startswith("torch.compile does not work here")
    hidden, weight, labels, words = leaves("random", torch.float64)
    expected = plain_linear_cross_entropy(hidden, weight, labels, words, ALONE).item()
    assert [json.loads(line) for line in losses] == pytest.approx([expected] * 2, rel=1e-12)  # sums in another order


def print_agreement(device: str) -> None:
    """In a process of its own: the loss on a device, in chunks, held to the truth in fp64 on the CPU."""
    for kind, dtype in (
        ("random", torch.float32), ("exact", torch.bfloat16), ("wrong", torch.float16), ("confident", torch.float16)
    ):  # fmt: skip
        hidden, weight, labels, words = leaves(kind, dtype)
        hidden, weight = (tensor.detach().to(device).requires_grad_() for tensor in (hidden, weight))
        with mock.patch.dict(loss.CHUNK_BYTES, {device: CHUNK * VOCABULARY * dtype.itemsize}):
            value = loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels.to(device), words, ALONE)
        value.backward(torch.tensor(UPSTREAM, dtype=value.dtype, device=device))
        assert hidden.grad is not None
        assert weight.grad is not None
        check([(value.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu())], kind, dtype)
    print("agrees")


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU")
def test_on_a_gpu_it_equals_the_plain_loss() -> None:
    process = cold_python("tests/support/call.py", __file__, "print_agreement", "cuda", CUDA_VISIBLE_DEVICES="0")
    assert process.stdout.splitlines()[-1:] == ["agrees"], process.stderr


def collectives(size: int) -> dict[str, dict[str, int]]:
    """On the crew: collectives of the forward and the backward, by name."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from opt_parallel.parallel.topology import Topology

    counts: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    class Count(TorchDispatchMode):
        phase = "forward"

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            is_waiting = name in ("wait_tensor", "_wrap_tensor_autograd")
            if function.namespace in ("_c10d_functional", "c10d") and not is_waiting:
                counts[self.phase][name] += 1
            return function(*args, **(kwargs or {}))

    with Topology.open(size) as topology, in_chunks(CHUNK, size, torch.float32):
        hidden, weight, labels, words = leaves("random", torch.float32, topology.tensor.rank, size)
        with Count() as mode:
            value = loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, topology.tensor)
            mode.phase = "backward"
            value.backward()
    return {phase: dict(count) for phase, count in counts.items()}


@pytest.mark.parametrize(("size", "expected"), [(1, {}), (2, {"_allgather_base_": CHUNKS})])
def test_communicates_once_a_chunk(crew: Any, size: int, expected: dict[str, int]) -> None:
    assert crew(size)(collectives, size) == [{"forward": expected, "backward": {}}] * size


def test_ranks_of_unequal_words_agree_about_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would wait for one another: memory for nearly ten tokens of the first ranks' 129 words is enough for
    ten of the last one's 128. One process plays all ranks in turn."""
    exchanged: dict[int, list[torch.Size]] = {rank: [] for rank in range(4)}
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 10 * 129 * 4 - 1)
    for rank, shapes in exchanged.items():

        def with_itself(tensor: Tensor, group: Group, shapes: list[torch.Size] = shapes) -> Tensor:
            shapes.append(tensor.shape)
            return torch.cat([tensor] * group.size, dim=-1)

        monkeypatch.setattr(loss, "all_gather_last", with_itself)
        hidden, weight, labels, words = leaves("random", torch.float32, rank, 4)
        loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, Group(None, rank, 4))
    assert all(shapes == exchanged[0] for shapes in exchanged.values()), exchanged


TOKENS, WORDS = (1024, 4096), 10_000
LOGITS = 2 * 2**20  # bytes of a chunk's logits in the memory's test


def print_peaks() -> None:
    """In a process of its own: bytes that a forward and backward takes at most above its inputs, for each number of
    tokens; last those of the plain loss, for the smallest number."""
    fused, plain = loss.vocab_parallel_linear_cross_entropy, plain_linear_cross_entropy
    weight = torch.randn(WORDS, WIDTH, requires_grad=True)
    peaks = []
    # eagerly, since the compiler itself takes memory; a few tokens first, for what libraries take anyway
    with mock.patch.object(compiled, "COMPILED_FROM", math.inf), mock.patch.dict(loss.CHUNK_BYTES, cpu=LOGITS):
        for function, tokens in ((plain, 16), (fused, 16), *((fused, tokens) for tokens in TOKENS), (plain, TOKENS[0])):
            weight.grad = None
            hidden = torch.randn(tokens, WIDTH, requires_grad=True)
            labels = torch.randint(0, WORDS, (tokens,))
            forget_peak()
            before = peak_memory()
            function(hidden, weight, labels, range(WORDS), ALONE).backward()
            peaks.append(peak_memory() - before)
    print(json.dumps(peaks[2:]))


def test_memory_is_that_of_a_chunk() -> None:
    """A chunk's logits and both gradients, once while they grow and once when they are returned; never tokens × words.

    In fp32, because CPUs that emulate bf16 would take a minute."""
    [line] = alone("print_peaks")
    *peaks, plain = json.loads(line)
    slack = 64 * 2**20  # what glibc keeps of freed memory; with it a chunk's softmax in fp32
    for tokens, peak in zip(TOKENS, peaks, strict=True):
        gradients = 2 * 4 * (WORDS + tokens) * WIDTH
        assert peak <= LOGITS + gradients + slack, f"{tokens} tokens took {peak:,} bytes"
    assert plain > LOGITS + 2 * 4 * (WORDS + TOKENS[-1]) * WIDTH + slack, "the measure sees nothing"


def test_no_gradient_is_formed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, words = leaves("random", torch.float64)
    value = loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, ALONE)
    monkeypatch.setattr(loss, "_Gradients", mock.Mock(side_effect=AssertionError("gradients are formed")))
    frozen = loss.vocab_parallel_linear_cross_entropy(hidden.detach(), weight.detach(), labels, words, ALONE)
    with torch.no_grad():
        without = loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, ALONE)
    assert torch.equal(frozen, value.detach())
    assert torch.equal(without, value.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [CHUNK, None])
def test_a_frozen_weight_has_no_gradient_and_costs_none(chunk: int | None, dtype: torch.dtype) -> None:
    """The hidden states' has the same bits, and nothing of the weight's size waits for the backward."""
    hidden, weight, labels, words = leaves("exact", dtype)
    with in_chunks(chunk, 1, dtype):
        loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, ALONE).backward()
        assert hidden.grad is not None
        trained, hidden.grad = hidden.grad, None
        value = loss.vocab_parallel_linear_cross_entropy(hidden, weight.detach(), labels, words, ALONE)
    assert value.grad_fn is not None
    assert [None if t is None else t.numel() for t in value.grad_fn.saved_tensors] == [hidden.numel(), None]
    value.backward()
    assert torch.equal(hidden.grad, trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [CHUNK, None])
def test_a_second_backward_fails_aloud(chunk: int | None, dtype: torch.dtype) -> None:
    """The first one scaled the gradients in place; scaling them again would be wrong without a word."""
    hidden, weight, labels, words = leaves("exact", dtype)
    with in_chunks(chunk, 1, dtype):
        value = loss.vocab_parallel_linear_cross_entropy(hidden, weight, labels, words, ALONE)
    value.backward(torch.full_like(value, UPSTREAM), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward(torch.full_like(value, UPSTREAM))
