"""Measure what a CPU needs for the operations of a step beside the large matrix products, in fp32.

Each measurement runs this trainer's own functions, or those of torch that it calls. A plan multiplies the results by
the numbers of tokens, scores, logits and parameters of any run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.benchmarks import host
from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.parallel.loss import vocab_parallel_linear_cross_entropy
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.topology import ALONE
from opt_parallel.planning.layer_time import COMPILED_FROM, element_bytes
from opt_parallel.planning.workload import Network, Workload

CALLS, SECONDS = 5, 1.5  # of each measurement, at most
TOKENS, WIDTH, HEADS = 512, 512, 8  # of attention and of element-wise operations
EAGER = COMPILED_FROM // 4  # elements of a tensor whose dropout is not compiled
WORDS, NARROW = 16384, 64  # of the loss, whose products are small beside its logits
EMBEDDING = 2**24  # elements of the embedding, whose gradients are allocated anew in each step
PARAMETERS = 2**22  # of the update


def seconds_of(work: Callable[[], object], most: float = SECONDS) -> float:
    """The median seconds of CALLS calls, or fewer if they take `most` seconds, after one that compiles and
    allocates."""
    work()
    times: list[float] = []
    while len(times) < CALLS and sum(times) < most:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def costs(peak: float, bandwidth: float) -> dict[str, float]:
    """The values of `Rates` and `OnCpu` by name. `peak` are the FLOP/s of products, and `bandwidth` the bytes/s of a
    copy."""
    forward, backward = fused_attention()
    flops = TOKENS * TOKENS * WIDTH  # of a product of attention, the half that is not masked
    return {
        "attention": 2 * flops / forward / peak,
        "attention_backward": 5 * flops / backward / peak,
        "memory": elementwise_bytes() / elementwise() / bandwidth,
        "host": layer_on_host(),
        "dropout": dropout(COMPILED_FROM) / COMPILED_FROM,
        "eager_dropout": dropout(EAGER) / EAGER,
        "score": unfused_attention() / (HEADS * TOKENS**2) - 6 * 2 * (WIDTH // HEADS) / peak,
        "logit": loss() / (TOKENS * WORDS),
        "embedding": embedding() / EMBEDDING,
        "update": update() / PARAMETERS,
    }


def elementwise() -> float:
    """Seconds of a layer's LayerNorms, residual sums, activation and copies of attention's inputs and output, forward
    and backward. torch copies a bias to the output of a product before it adds the product, and the bias's gradient is
    a sum."""
    hidden, wide, projected = (torch.randn(1, TOKENS, WIDTH * times, requires_grad=True) for times in (1, 4, 3))
    scale, shift = (torch.ones(WIDTH, requires_grad=True) for _ in range(2))
    gradient, by_wide, by_projected = (torch.randn_like(each) for each in (hidden, wide, projected))

    def work() -> None:
        once = hidden + F.layer_norm(hidden, (WIDTH,), scale, shift)
        twice = once + F.layer_norm(once, (WIDTH,), scale, shift)
        heads = projected.view(1, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = heads[2].transpose(1, 2).reshape(1, TOKENS, -1)
        outputs, gradients = [twice, wide.relu(), mixed], [gradient, by_wide, gradient]
        torch.autograd.grad(outputs, [hidden, scale, shift, wide, projected], gradients)
        for each in (by_projected, gradient, by_wide, gradient):
            bias = each.flatten(0, 1).sum(0)
            bias.expand(TOKENS, -1).contiguous()

    return seconds_of(work)


def elementwise_bytes() -> float:
    """The bytes that a plan counts for these operations."""
    network = Network(layers=1, hidden=WIDTH, heads=HEADS, ffn=4 * WIDTH, vocab=0)
    return element_bytes(Workload(network, length=TOKENS, precision="fp32"), again=0.0)


def dropout(elements: int) -> float:
    """Seconds of hidden dropout, forward and backward."""
    hidden, draw = torch.ones(1, elements // WIDTH, WIDTH), Draw(1, 0, 0, 0, torch.zeros(1, dtype=torch.long))
    return 2 * seconds_of(lambda: draw.dropout(hidden, 0.1, layer=0, site=0))


def fused_attention() -> tuple[float, float]:
    """Seconds of the forward and of the backward without dropout."""
    query, key, value = attention_inputs()
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    gradient = torch.randn_like(output)
    forward = seconds_of(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    return forward, seconds_of(lambda: torch.autograd.grad(output, [query, key, value], gradient, retain_graph=True))


def unfused_attention() -> float:
    """Seconds of forward and backward with dropout."""
    query, key, value = attention_inputs()
    gradient = torch.randn_like(query)

    def work() -> None:
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True)
        torch.autograd.grad(output, [query, key, value], gradient)

    return seconds_of(work)


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    shape = (1, HEADS, TOKENS, WIDTH // HEADS)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    return query, key, value


def loss() -> float:
    """Seconds of the loss and its gradients, less those of its three products."""
    hidden, weight = torch.randn(TOKENS, NARROW, requires_grad=True), torch.randn(WORDS, NARROW, requires_grad=True)
    labels, by_logits = torch.zeros(TOKENS, dtype=torch.long), torch.randn(TOKENS, WORDS)
    left, right = hidden.detach(), weight.detach()

    def work() -> None:
        total = vocab_parallel_linear_cross_entropy(hidden, weight, labels, range(WORDS), ALONE)
        torch.autograd.grad(total, [hidden, weight])

    def products() -> None:
        left @ right.T, by_logits @ right, by_logits.T @ left

    return max(0.0, seconds_of(work) - seconds_of(products))


def embedding() -> float:
    """Seconds of the tied embedding's gradient beside the products: the loss's part is scaled, that of the inputs is
    computed, and both are added."""
    weight = torch.ones(EMBEDDING // WIDTH, WIDTH, requires_grad=True)
    ids, gradient, by_loss = torch.zeros(TOKENS, dtype=torch.long), torch.ones(TOKENS, WIDTH), torch.ones(weight.shape)

    def work() -> None:
        scaled = by_loss * 0.5
        (by_inputs,) = torch.autograd.grad(F.embedding(ids, weight), weight, gradient)
        scaled.add_(by_inputs)

    return seconds_of(work)


@torch.no_grad()
def update() -> float:
    """Seconds of the update of fp32 weights from a gradient, as `gradients.PartitionedGradients` does it."""
    weights, gradient = torch.ones(PARAMETERS), torch.full([PARAMETERS], 1e-3)
    own = torch.nn.Parameter(torch.ones(PARAMETERS))
    own.grad = torch.zeros(PARAMETERS)
    optimizer = torch.optim.AdamW([own], lr=1e-4, fused=True)

    def work() -> None:
        assert own.grad is not None
        own.grad.copy_(gradient)
        torch._foreach_norm([own.grad])
        torch._foreach_mul_([own.grad], 0.5)
        optimizer.step()
        weights.copy_(own)

    return seconds_of(work)


def layer_on_host() -> float:
    """Seconds in which Python and torch start the operations of a layer, forward and backward, whose tensors are so
    small that computing takes almost no time."""
    short, long = (
        seconds_of(partial(host.step, host.tiny_model(layers, ALONE, ActivationCheckpointing.none, sequence=False)))
        for layers in (host.SHORT, host.LONG)
    )
    return max(0.0, long - short) / (host.LONG - host.SHORT)
