"""Bytes of activations and of the loss on a rank of this trainer.

Each term names the tensors of `model/opt.py` and `parallel/loss.py` that it counts. The tests hold the sum against the
traces of `docs/memory.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opt_parallel.planning.parameters import embedding_parameters
from opt_parallel.planning.workload import Recompute, Workload

CHUNK_BYTES, ROWS = 512 * 2**20, 16384  # of the loss on a GPU, see `parallel/loss.py`
CPU_CHUNK_BYTES, CPU_ROWS = 64 * 2**20, 2048


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch. `saved` exists between the forward and the backward, `layer` is one layer's part of it.
    `logits` are the chunk of logits, the gradients and the products of the loss. `temporary` exists for an operator."""

    layer: int
    saved: int
    logits: int
    temporary: int
    peak_at: str

    @property
    def total(self) -> int:
        return self.saved + self.logits + self.temporary


def hidden_bytes(workload: Workload) -> int:
    """One tensor (B, S, H) of hidden states."""
    return workload.micro * workload.length * workload.network.hidden * workload.value


def part_bytes(workload: Workload) -> int:
    """A rank's part (B, s, H) of the hidden states with sequence parallelism, else all of them."""
    positions = -(-workload.length // workload.splits)
    return workload.micro * positions * workload.network.hidden * workload.value


def layer_bytes(workload: Workload, recompute: Recompute) -> int:
    """What one layer keeps from its forward to its backward (Korthikanti et al. 2022, section 4, for our layers).

    Attention keeps its input, the output of the LayerNorm before it, query, key and value, the output of the heads and
    the logarithm of each row's sum (fp32). The feed-forward keeps its input, the output of its LayerNorm, and the
    output of the activation. A LayerNorm keeps mean and 1/σ (fp32). Dropout keeps nothing."""
    network, tensor = workload.network, workload.tensor
    tokens, part = workload.micro * workload.length, part_bytes(workload)
    if recompute in (Recompute.full, Recompute.offload):
        return part if recompute is Recompute.full else 0
    statistics = 2 * 4 * workload.micro * -(-workload.length // workload.splits)
    heads = workload.value * tokens * (2 * network.queries + 2 * network.keys) // tensor
    heads += 4 * tokens * network.heads // tensor
    if workload.packed:  # the mask as numbers that are added to the scores
        heads += workload.value * workload.micro * workload.length**2
    if recompute is Recompute.selective:
        return part * (2 if network.norm_first else 3) + statistics + heads
    ffn = workload.value * tokens * network.ffn // tensor * (1 if network.activation_saves_output else 2)
    return 4 * part + 2 * statistics + heads + ffn


def loss_bytes(workload: Workload) -> int:
    """The loss at its last chunk of tokens: the chunk's logits, the gradients of the hidden states and of the rows of
    the vocabulary (fp32 if there are several chunks, and in fp16), and a product in fp32: the chunk's gradient of the
    hidden states, or two blocks of the gradient of the rows."""
    network, value = workload.network, workload.value
    tokens, rows = workload.micro * workload.length, -(-network.vocab // workload.tensor)
    most, block = (CPU_CHUNK_BYTES, CPU_ROWS) if workload.cpu else (CHUNK_BYTES, ROWS)
    chunks = -(-tokens // max(1, most // (rows * value)))
    chunk = -(-tokens // chunks)
    exact = 4 if workload.precision == "fp16" else value
    gradients = network.width * (tokens * exact + (0 if workload.lora else rows * (exact if chunks == 1 else 4)))
    products = 4 * max(chunk, 0 if workload.lora else min(2 * block, rows)) * network.width
    return rows * value * chunk + gradients + products


def _at_the_loss(workload: Workload) -> Activations:
    """In the loss, all layers hold what they keep. The input of the last LayerNorm and its output exist too, and with
    sequence parallelism all positions of the output beside this rank's. A layer's input on its way to the host exists
    until the copy ends."""
    layer = layer_bytes(workload, workload.recompute)
    part, network = part_bytes(workload), workload.network
    output = hidden_bytes(workload) * network.width // network.hidden
    last = part + output + (output // workload.splits if workload.sequence else 0)
    last += output if network.projected else 0  # the embeddings before their projection
    last += part if workload.recompute is Recompute.offload else 0
    return Activations(layer, network.layers * layer + last, loss_bytes(workload), 0, "the loss")


def _at_the_last_layer(workload: Workload) -> Activations:
    """In the backward of the last layer, which has recomputed what it did not keep. The gradient of the rows of the
    vocabulary waits for that of the embedding.

    The gradient of the residual sum exists, and either the gradients before and after the activation, or the gradient
    after it with both gradients of the first product: of its input (with sequence parallelism also the gathered input)
    and of its weight."""
    network, value, tensor = workload.network, workload.value, workload.tensor
    layer, part, hidden = layer_bytes(workload, workload.recompute), part_bytes(workload), hidden_bytes(workload)
    again = layer_bytes(workload, Recompute.none) - layer if workload.recompute is not Recompute.none else 0
    if workload.recompute is Recompute.selective:  # attention's LayerNorm is recomputed later
        again -= part
    again += part if workload.recompute is Recompute.offload else 0
    rows = 0 if workload.lora else embedding_parameters(network, tensor) * value
    ffn = value * workload.micro * workload.length * network.ffn // tensor
    weight = 0 if workload.lora else value * network.hidden * network.ffn // tensor
    copies = 3 if workload.cpu else 1  # gloo's sum of parts receives the other ranks' parts in a tensor of its own
    product = hidden + (copies * hidden if workload.sequence else weight)
    temporary = part + ffn + max(ffn, product)
    if workload.stage == 3 and workload.data > 1:  # DeepSpeed sums the gradient of a matrix in an fp32 copy
        temporary += 4 * weight // value
    return Activations(layer, network.layers * layer + again, rows, temporary, "the backward of the last layer")


def at_the_first_layer(workload: Workload) -> Activations:
    """In the backward of the first layer, when no other layer holds anything."""
    network = replace(workload.network, layers=1)
    last = _at_the_last_layer(replace(workload, network=network))
    return replace(last, logits=0, peak_at="the backward of the first layer")


def activations(workload: Workload) -> Activations:
    """The activations where their sum is largest."""
    return max(_at_the_loss(workload), _at_the_last_layer(workload), key=lambda each: each.total)
