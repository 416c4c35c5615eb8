"""Seconds of one layer, and of the embedding with the output projection, for one micro-batch on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning import rates as constants
from opt_parallel.planning.cluster import Cluster, Link, OnCpu, Rates
from opt_parallel.planning.parameters import layer_matrices, share_again
from opt_parallel.planning.rates import beside, rates_of
from opt_parallel.planning.workload import Recompute, Trainer, Workload

FUSED_PASSES, EAGER_PASSES = 1.0, 2.5  # passes over memory, relative to fused element-wise operations
COMPILED_FROM = 2**19  # elements from which dropout is compiled, see `parallel/compiled.py`


@dataclass(frozen=True)
class Layer:
    """Seconds of a forward and a backward, with what is computed again. `forward` is the forward's share."""

    products: float
    attention: float
    elementwise: float
    tensor: float
    forward: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise + self.tensor


def collective(size: float, ranks: int, link: Link, share: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of a tensor of `size` bytes in a ring of `ranks`. An all-reduce
    takes both. (n − 1)/n of the bytes pass each link (Thakur et al. 2005), after n − 1 latencies."""
    return 0.0 if ranks == 1 else (ranks - 1) * (size / ranks / (link.bandwidth * share) + link.latency)


def exposed(sent: float, computed: float, slowed: float) -> float:
    """Seconds that a collective adds to the computation beside it: what the computation does not hide, and the share
    `slowed` of what it hides, because both use the device."""
    return max(0.0, sent - computed) + slowed * min(sent, computed)


def rate_of_products(workload: Workload, cluster: Cluster, rates: Rates, *dims: float) -> float:
    """FLOP/s of a product with these dims."""
    device, fp8 = cluster.device, workload.precision == "fp8"
    share = rates.fp8 if fp8 else rates.product
    for dim in dims:
        share *= dim / (dim + (constants.FP8_SMALL if fp8 else rates.small))
    return device.peak[workload.precision] * share


def _attention(workload: Workload, cluster: Cluster, rates: Rates, again: float) -> float:
    """Attention. A fused kernel computes the unmasked half: two products in the forward, five in the backward, which
    computes the scores again (Dao 2023, arXiv 2307.08691). Unfused attention computes all of it, and its softmax, mask
    and dropout read and write the scores: about 13 bytes each in the forward and 20 in the backward."""
    network, tokens = workload.network, workload.micro * workload.length / workload.context
    peak = cluster.device.peak["bf16" if workload.precision == "fp8" else workload.precision]
    product = 2.0 * tokens * workload.length * network.queries / workload.tensor
    if workload.flash:
        forward = 2 * product / 2 / (peak * rates.attention)
        return forward * (1 + again) + 5 * product / 2 / (peak * rates.attention_backward)
    scores = network.heads * workload.length * tokens / workload.tensor
    if rates.on_cpu:
        moved = scores * rates.on_cpu.score * (1 + again / 3)
        return product * (2 * (1 + again) + 4) / (peak * rates.product) + moved
    moved = scores * (13 * (1 + again) + 20) / (cluster.device.bandwidth * rates.memory)
    return product * (2 * (1 + again) + 4) / (peak * rates.product * 0.7) + moved


def element_bytes(workload: Workload, again: float) -> float:
    """Bytes of element-wise operations. Per token, normalisations, dropout and residual sums move about 11 values of
    the hidden width in the forward and 16 in the backward, split over the ranks with sequence parallelism; the
    activation moves 2 values of the feed-forward's width (3 if gated) and 3 (5) in the backward; attention copies its
    inputs."""
    network, tokens = workload.network, workload.micro * workload.length / workload.context
    hidden = workload.network.hidden / workload.splits
    ffn, gated = network.ffn / workload.tensor, network.gated
    forward = 11 * hidden + (3 if gated else 2) * ffn + 4 * network.queries / workload.tensor
    backward = 16 * hidden + (5 if gated else 3) * ffn + 4 * network.queries / workload.tensor
    cast = 3 * (2 * hidden + ffn + network.queries) / workload.tensor if workload.precision == "fp8" else 0.0
    return workload.value * tokens * (forward * (1 + again) + backward + cast * (2 + again))


def _dropout_on_cpu(workload: Workload, cost: OnCpu, again: float) -> float:
    """Both dropouts of a layer, whose hashed masks are computed again in the backward. A GPU computes them while it
    reads and writes the hidden states, a CPU does not."""
    if not workload.network.dropout:
        return 0.0
    elements = workload.micro * workload.length * workload.network.hidden / workload.splits
    each = cost.dropout if elements >= COMPILED_FROM else cost.eager_dropout
    return 2 * elements * each * (1 + again / 2)


def _tensor(workload: Workload, cluster: Cluster, rates: Rates, again: float, by_weight: float) -> float:
    """The tensor group's collectives of a layer: two all-reduces in the forward and two in the backward (Shoeybi et al.
    2019), or an all-gather and a reduce-scatter for each.

    This trainer sums the gradient of a product's input, and with sequence parallelism gathers the input again, beside
    the gradient of the weight, which takes `by_weight` seconds (`parallel/products.py`)."""
    if workload.tensor == 1:
        return 0.0
    size = workload.value * workload.micro * workload.length / workload.context * workload.network.hidden
    each = collective(size, workload.tensor, *_link(workload, cluster, rates))
    if workload.trainer is not Trainer.ours:
        return 2 * each * (4 + 2 * again) * _left(workload)
    repeated = 3 if workload.sequence else 2  # full recomputation leaves out the last sum
    after = 4 + (repeated if again == 1.0 else 0) + (2 if workload.sequence else 0)
    return each * after + exposed(4 * each, by_weight, beside(cluster.device))


def _link(workload: Workload, cluster: Cluster, rates: Rates) -> tuple[Link, float]:
    """The link between the ranks of a tensor group, and the share of it that large collectives reach."""
    inside = workload.tensor <= cluster.per_host
    return (cluster.within, rates.within) if inside else (cluster.between, rates.between)


def _left(workload: Workload) -> float:
    """The share of a tensor group's collectives that products in pieces do not hide."""
    if not workload.overlap:
        return 1.0
    return constants.PIECES if workload.trainer is Trainer.megatron else constants.TORCH_PIECES


def layer_of(workload: Workload, cluster: Cluster) -> Layer:
    """The seconds of one layer for one micro-batch."""
    network, rates = workload.network, rates_of(cluster.device, workload)
    tokens, tensor = workload.micro * workload.length / workload.context, workload.tensor
    columns = layer_matrices(network) / (3 if network.gated else 2) / network.hidden / tensor
    rate = rate_of_products(workload, cluster, rates, network.hidden, columns, tokens)
    flops = 2.0 * layer_matrices(network) * tokens / tensor
    again = share_again(workload)
    backward = 1.0 if workload.lora else 2.0
    passes = FUSED_PASSES if workload.compiled or workload.trainer is Trainer.megatron else EAGER_PASSES
    moved = element_bytes(workload, again.elementwise) * passes / (cluster.device.bandwidth * rates.memory)
    if rates.on_cpu:
        moved += _dropout_on_cpu(workload, rates.on_cpu, again.elementwise)
    products = flops * (1 + again.products + backward) / rate
    attention = _attention(workload, cluster, rates, again.attention)
    columns_share = (network.queries + 2 * network.keys + network.ffn) * network.hidden / layer_matrices(network)
    whole = 1.0 if workload.recompute in (Recompute.full, Recompute.offload) else again.products
    tensors = _tensor(workload, cluster, rates, whole, columns_share * flops / rate)
    return Layer(products, attention, moved, tensors, forward=1 / (2 + backward))


def head_of(workload: Workload, cluster: Cluster) -> Layer:
    """The seconds of the output projection and the loss for one micro-batch, on the last pipeline stage.

    Unfused, a logit is read and written in about ten operations in fp32; compiled, in three."""
    network, rates = workload.network, rates_of(cluster.device, workload)
    tokens, tensor = workload.micro * workload.length / workload.context, workload.tensor if workload.head_split else 1
    flops = 2.0 * network.vocab * network.width * tokens / tensor
    rate = cluster.device.peak["bf16" if workload.precision == "fp8" else workload.precision] * rates.product
    if rates.on_cpu:
        rate = rate_of_products(workload, cluster, rates, network.width, network.vocab / tensor, tokens)
    split = tensor if workload.logits.split else 1
    each = constants.COMPILED_LOGIT_BYTES if workload.compiled else constants.LOGIT_BYTES
    by_logit = rates.on_cpu.logit if rates.on_cpu else each / (cluster.device.bandwidth * rates.memory)
    moved = by_logit * tokens * network.vocab / split
    if rates.on_cpu and not workload.lora:
        moved += rates.on_cpu.embedding * network.vocab / tensor * network.width
    size = workload.value * tokens * (network.hidden if workload.logits.split else network.vocab)
    sent = 2 * collective(size, tensor, *_link(workload, cluster, rates))
    return Layer(flops * (2 if workload.lora else 3) / rate, 0.0, moved, sent, 1 / 3)
