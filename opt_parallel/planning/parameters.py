"""Counts of the parameters and of the FLOPs of a decoder, by part and by rank."""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.workload import Network, Recompute, Trainer, Workload


@dataclass(frozen=True)
class LayerParameters:
    """The parameters of one decoder layer on one tensor rank. `split` are matrices and biases of which each rank holds
    1/t, `whole` normalisations and the biases of row-parallel layers, of which each rank holds a copy."""

    split: int
    whole: int

    @property
    def total(self) -> int:
        return self.split + self.whole


def layer_matrices(network: Network) -> int:
    """Elements of one layer's matrices: queries, keys, values, output, and the two or three of the feed-forward."""
    attention = network.hidden * (2 * network.queries + 2 * network.keys)
    return attention + (3 if network.gated else 2) * network.hidden * network.ffn


def layer_parameters(network: Network, tensor: int = 1) -> LayerParameters:
    """One layer's parameters on one of `tensor` ranks."""
    biases = network.queries + 2 * network.keys + (2 if network.gated else 1) * network.ffn if network.biases else 0
    whole = (2 * network.hidden if network.biases else 0) + 2 * network.norm * network.hidden
    return LayerParameters(-(-(layer_matrices(network) + biases) // tensor), whole)


def embedding_parameters(network: Network, tensor: int = 1) -> int:
    """The token embedding on one of `tensor` ranks. The vocabulary is padded to a multiple of the ranks."""
    return -(-network.vocab // tensor) * network.width


def first_parameters(network: Network, tensor: int = 1) -> int:
    """The parameters before the first layer: both embeddings, and the projection to the hidden width."""
    projection = network.width * network.hidden if network.projected else 0
    return embedding_parameters(network, tensor) + network.rows * network.hidden + projection


def last_parameters(network: Network, tensor: int = 1) -> int:
    """The parameters after the last layer, without an output projection that shares the embedding's weights."""
    projection = network.width * network.hidden if network.projected else 0
    norm = network.norm * network.hidden if network.final_norm else 0
    return norm + projection + (0 if network.tied else embedding_parameters(network, tensor))


def parameters(network: Network) -> int:
    """All parameters of a network."""
    layers = network.layers * layer_parameters(network).total
    return layers + first_parameters(network) + last_parameters(network)


def lora_parameters(workload: Workload) -> int:
    """The parameters of LoRA on one rank, for queries and values: each has A (rank, H) and B (out/t, rank)."""
    network, rank = workload.network, workload.lora
    each = 2 * rank * network.hidden + rank * (network.queries + network.keys) // workload.tensor
    return network.layers * each


def forward_flops(network: Network, length: int) -> tuple[float, float, float]:
    """FLOPs of the forward of one token: of the layers' products, of attention's products, and of the output
    projection. A product of n elements of a matrix takes 2 n FLOPs. Attention counts in full, although its mask is
    causal (Narayanan et al. 2021, section 5.1)."""
    products = network.layers * 2 * layer_matrices(network)
    projections = 4 * network.width * network.hidden if network.projected else 0
    attention = network.layers * 4 * length * network.queries
    return products + projections, attention, 2 * network.vocab * network.width


def model_flops(workload: Workload) -> float:
    """FLOPs to train on one token: a backward counts as two forwards. LoRA's frozen weights have no gradients."""
    products, attention, head = forward_flops(workload.network, workload.length)
    frozen = products + head if workload.lora else 0.0
    return 3.0 * (products + attention + head) - frozen


@dataclass(frozen=True)
class Again:
    """The share of a forward that the backward computes again."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0


def share_again(workload: Workload) -> Again:
    """What is computed again, as a share of a layer's forward.

    This trainer's full recomputation leaves out the layer's last product if no LayerNorm follows it."""
    network, mode = workload.network, workload.recompute
    matrices, ffn = layer_matrices(network), network.hidden * network.ffn
    if mode in (Recompute.full, Recompute.offload):
        left = ffn / matrices if workload.trainer is Trainer.ours and network.norm_first else 0.0
        return Again(1.0 - left, 1.0, 1.0)
    if mode is Recompute.selective:
        return Again(ffn / matrices, 0.0, 1.0)
    if mode is Recompute.attention:
        return Again(0.0, 0.0 if workload.flash else 1.0, 0.0)
    if mode is Recompute.feed_forward:
        return Again((3 if network.gated else 2) * ffn / matrices, 0.0, 0.5)
    if mode is Recompute.operators:
        kept = network.hidden * (network.queries + network.keys) + (2 if network.gated else 1) * ffn
        return Again(1.0 - kept / matrices, 0.0, 1.0)
    return Again()


def recomputed_flops(workload: Workload) -> float:
    """FLOPs that the backward repeats for one token."""
    again, (products, attention, _) = share_again(workload), forward_flops(workload.network, workload.length)
    return again.products * products + again.attention * attention
