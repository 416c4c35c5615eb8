"""Memory of Megatron-LM, whose published records other planners are held against.

Megatron-LM logs the memory of the last rank, which is in the last pipeline stage. Korthikanti et al. instead give the
layers of the first stage, which holds most micro-batches. `Workload.stage_memory` selects one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.parameters import embedding_parameters, first_parameters, layer_parameters
from opt_parallel.planning.workload import Network, Recompute, Workload

MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this number times the tensor degree


@dataclass(frozen=True)
class Held:
    """Bytes that a rank of any trainer holds."""

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    logits: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments


@dataclass(frozen=True)
class Part(Held):
    """Bytes of a rank of Megatron-LM."""

    workspace: int

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits + self.workspace


def padded(network: Network, tensor: int) -> int:
    """The vocabulary with padding."""
    return -(-network.vocab // (MULTIPLE * tensor)) * MULTIPLE * tensor


def stage_parameters(workload: Workload, last: bool) -> int:
    """Parameters of one rank of the first or last pipeline stage. The last stage has its own copy of a tied embedding.
    Korthikanti et al. count the layers of the first stage only."""
    network, tensor = workload.network, workload.tensor
    rows = padded(network, tensor) // tensor * network.width
    total = network.layers // workload.pipeline * layer_parameters(network, tensor).total
    positions = first_parameters(network, tensor) - embedding_parameters(network, tensor)
    both = workload.pipeline == 1
    if workload.stage_memory == "first":
        return total
    if not last or both:
        total += rows + positions
    if last or both:
        total += network.norm * network.hidden + (rows if not both or not network.tied else 0)
    return total


def layer_bytes(workload: Workload, copies: int) -> int:
    """The bytes of activations that a layer keeps for the backward of a micro-batch (Korthikanti et al. 2022, arXiv
    2205.05198, section 4).

    Without tensor parallelism these are their 34 s b h + 5 a s² b: the inputs and outputs of two LayerNorms (8 s b h),
    two masks of dropout (2 s b h), query, key and value (6 s b h), the input of the output projection (2 s b h), the
    feed-forward before and after its activation (16 s b h); of unfused attention the softmax, its mask of dropout and
    the result (5 a s² b). A fused kernel keeps its output once more (`copies`). Grouped keys, gated and other
    feed-forward widths change the terms."""
    network, tensor, tokens = workload.network, workload.tensor, workload.micro * workload.length // workload.context
    hidden, value = network.hidden, workload.value
    if workload.recompute is Recompute.full:
        return value * tokens * hidden // workload.splits
    entry = 1 if workload.precision == "fp8" else value  # an input of a product, which fp8 keeps in fp8
    outer = 2 * (value + entry) * hidden + (2 * hidden if network.dropout else 0)
    queries = value * (network.queries + 2 * network.keys) + network.queries * entry
    queries += value * network.queries if workload.flash and (copies == 2 or workload.precision == "fp8") else 0
    ffn = network.ffn * (value * (2 if network.gated else 1) + entry)
    if workload.recompute is Recompute.feed_forward:
        ffn = 0
    scores = 0
    if not workload.flash and workload.recompute is Recompute.none:
        kept = 2 * value + 1 if network.attention_dropout else value
        scores = kept * network.heads * workload.length**2 * workload.micro // tensor
    return tokens * outer // workload.splits + tokens * (queries + ffn) // tensor + scores


def layers_in_flight(workload: Workload, last: bool) -> float:
    """Layers times micro-batches whose activations the stage holds at once, in the schedules of Narayanan et al. 2021
    (arXiv 2104.04473, section 2.2): one forward, one backward; with `virtual` pieces of each stage interleaved."""
    pipeline, virtual = workload.pipeline, workload.virtual
    chunk = workload.network.layers / (pipeline * virtual)
    most = workload.accumulation * virtual
    if last:
        return chunk * min(most, (virtual - 1) * pipeline + 1)
    warm = pipeline if virtual == 1 else 2 * (pipeline - 1) + (virtual - 1) * pipeline + 1
    return chunk * min(most, warm)


def part(workload: Workload, device: str, last: bool = True) -> Part:
    """The bytes of a rank at the loss of the last stage, or in the steady state of the first stage."""
    copies = 1 if device.startswith("h") else 2  # Hopper's kernel of cuDNN keeps its output once
    network, states = workload.network, workload.states
    own = stage_parameters(workload, last)
    shards = workload.data * workload.context if workload.stage else 1
    tokens = workload.micro * workload.length // workload.context
    hidden = workload.value * tokens * network.hidden
    held = round(layers_in_flight(workload, last) * layer_bytes(workload, copies))
    logits = 0
    if last:
        split = workload.tensor if workload.logits.split else 1
        logits = round(workload.logits.value * tokens * (padded(network, workload.tensor) // split))
        # the input and the output of the last LayerNorm and the stage's input; all positions of the output
        held += 3 * hidden // workload.splits + (hidden if workload.sequence else 0)
    messages = 0 if workload.pipeline == 1 else 2 if workload.virtual == 1 else 6
    trained = 0 if workload.lora else own  # LoRA's own matrices are below a thousandth
    return Part(
        own * states.weight,
        trained * states.gradient,
        trained * states.master // shards,
        trained * states.moments // shards,
        held,
        logits,
        workload.workspace + messages * hidden // workload.splits,
    )
