"""Bytes of activations and of the loss on a rank of this trainer.

Each term names the tensors of `model/opt.py` and `parallel/loss.py` that it counts. The tests hold the sum against the
traces of `docs/memory.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.parameters import embedding_parameters
from opt_parallel.planning.workload import Recompute, Workload

CHUNK_BYTES, ROWS = 512 * 2**20, 16384  # of the loss on a GPU, see `parallel/loss.py`


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
    the vocabulary (fp32 if there are several chunks, and in fp16), and two blocks of its product in fp32."""
    network, value = workload.network, workload.value
    tokens, rows = workload.micro * workload.length, -(-network.vocab // workload.tensor)
    chunks = -(-tokens // max(1, CHUNK_BYTES // (rows * value)))
    exact = 4 if workload.precision == "fp16" else value
    gradients = network.width * (tokens * exact + (0 if workload.lora else rows * (exact if chunks == 1 else 4)))
    products = 0 if workload.lora else 4 * min(2 * ROWS, rows) * network.width
    return rows * value * -(-tokens // chunks) + gradients + products


def _at_the_loss(workload: Workload) -> Activations:
    """In the loss, all layers hold what they keep. The input of the last LayerNorm and its output exist too, and with
    sequence parallelism all positions of the output beside this rank's."""
    layer = layer_bytes(workload, workload.recompute)
    part, network = part_bytes(workload), workload.network
    output = hidden_bytes(workload) * network.width // network.hidden
    last = part + output + (output // workload.splits if workload.sequence else 0)
    return Activations(layer, network.layers * layer + last, loss_bytes(workload), 0, "the loss")


def _at_the_last_layer(workload: Workload) -> Activations:
    """In the backward of the last layer, which has recomputed what it did not keep. The gradient of the rows of the
    vocabulary waits for that of the embedding."""
    layer = layer_bytes(workload, workload.recompute)
    again = layer_bytes(workload, Recompute.none) - layer if workload.recompute is not Recompute.none else 0
    rows = 0 if workload.lora else embedding_parameters(workload.network, workload.tensor) * workload.value
    ffn = workload.value * workload.micro * workload.length * workload.network.ffn // workload.tensor
    temporary = 2 * part_bytes(workload) + 2 * hidden_bytes(workload) + 2 * ffn
    saved = workload.network.layers * layer + again
    return Activations(layer, saved, rows, temporary, "the backward of the last layer")


def activations(workload: Workload) -> Activations:
    """The activations where their sum is largest."""
    return max(_at_the_loss(workload), _at_the_last_layer(workload), key=lambda each: each.total)
