"""Memory of trainers on torch's fully sharded data parallelism: torchtitan, KempnerForge, fms-fsdp.

Each data rank holds 1/D of weights, moments and gradients, and gathers the bf16 weights of a layer while it is used
(Zhao et al. 2023, arXiv 2304.11277). With several micro-batches, gradients that are not reduced in each of them stay
unsplit, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opt_parallel.planning import megatron
from opt_parallel.planning.parameters import layer_parameters
from opt_parallel.planning.workload import Recompute, Workload

GATHERED = 2  # bytes of a gathered weight


@dataclass(frozen=True)
class Part(megatron.Held):
    """Bytes of a rank, at the peak of its memory."""

    gathered: int
    peak_at: str

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits + self.gathered


def ends(workload: Workload) -> int:
    """Parameters of the embedding and of the output projection on one rank of the tensor group."""
    network, tensor = workload.network, workload.tensor
    rows = network.vocab * network.width
    embedding = rows // (tensor if workload.embedding_split else 1)
    return embedding + (0 if network.tied else rows // tensor)


def layer_bytes(workload: Workload) -> int:
    """What a layer keeps of a micro-batch. `operators` keeps the layer's input, the results of the products of queries,
    values, the first of the feed-forward and its last, and attention's output."""
    network, tensor = workload.network, workload.tensor
    tokens, value = workload.micro * workload.length // workload.context, workload.value
    if workload.recompute is not Recompute.operators:
        return megatron.layer_bytes(workload, copies=1)
    split = 2 * network.queries + network.keys + network.ffn
    outer = 2 * network.hidden
    return value * tokens * (outer // workload.splits + split // tensor) + 4 * tokens * network.heads // tensor


def _split(workload: Workload) -> bool:
    return workload.data * workload.context > 1


def part(workload: Workload) -> Part:
    """The bytes of a rank where their sum is largest: at the loss, in the backward of the last layer, or at the end of
    the backward. In a pipeline, those of its first stage or, unless the publication gives that one, of its last."""
    if workload.pipeline == 1:
        places = [_at_the_loss(workload), _at_the_last_layer(workload), _at_the_end(workload)]
    else:
        lasts = (False,) if workload.stage_memory == "first" else (False, True)
        places = [_of_a_stage(workload, last) for last in lasts]
    return max(places, key=lambda each: each.total)


def _of_a_stage(workload: Workload, last: bool) -> Part:
    """A stage of torch's pipeline (torch.distributed.pipelining), between the first and the last backward of a step.
    Until then the weights stay gathered and the gradients are sums in fp32 that are not split. The stage holds its
    layers' inputs of several micro-batches, one layer that is computed again, and for every micro-batch of the step
    what it sends in the forward and receives in the backward; the last stage, which sends nothing, all logits."""
    network, states, shards = workload.network, workload.states, workload.data * workload.context
    rows = network.vocab * network.width // (workload.tensor if workload.embedding_split or last else 1)
    own = network.layers * layer_parameters(network, workload.tensor).total // workload.pipeline + rows
    tokens = workload.micro * workload.length // workload.context
    again = megatron.layer_bytes(replace(workload, recompute=Recompute.none), copies=1)
    held = round(megatron.layers_in_flight(workload, last) * layer_bytes(workload)) + again
    sent = 2 * workload.accumulation * workload.value * tokens * network.hidden
    logit = tokens * network.vocab // (workload.tensor if workload.logits.split else 1)
    logits = (workload.logits.value + workload.value * (workload.accumulation - 1)) * logit
    return Part(
        own * states.weight // shards,
        own * 4,
        own * states.master // shards,
        own * states.moments // shards,
        held + (sent // 2 if last else sent),
        round(logits) if last else 0,
        GATHERED * own if shards > 1 else 0,
        f"the {'last' if last else 'first'} stage",
    )


def _states(workload: Workload) -> tuple[int, int, int]:
    """Bytes of weights, masters and moments."""
    network, states, shards = workload.network, workload.states, workload.data * workload.context
    own = network.layers * layer_parameters(network, workload.tensor).total + ends(workload)
    return own * states.weight // shards, own * states.master // shards, own * states.moments // shards


def _gradients(workload: Workload) -> int:
    network, shards = workload.network, workload.data * workload.context
    own = network.layers * layer_parameters(network, workload.tensor).total + ends(workload)
    return own * workload.states.gradient // (shards if workload.gradients_split else 1)


def _at_the_loss(workload: Workload) -> Part:
    """All layers hold what they keep. Beside the logits there are the last normalisation in fp32 (its input, its result
    and one more), the embedding's output, and one gathered layer. There are gradients between micro-batches, and none
    between steps, but torchtitan publishes what the allocator reserves, which has had them."""
    network, tokens = workload.network, workload.micro * workload.length // workload.context
    weights, masters, moments = _states(workload)
    layer = layer_parameters(network, workload.tensor).total
    hidden = tokens * network.hidden
    held = network.layers * layer_bytes(workload) + 3 * 4 * hidden // workload.splits
    held += 2 * workload.value * hidden if workload.sequence and not workload.overlap else 0  # gathered in pieces
    split = workload.tensor if workload.logits.split else 1
    gathered = GATHERED * (layer + (ends(workload) if workload.ends_gathered else 0))
    return Part(
        weights,
        _gradients(workload) if workload.accumulation > 1 or workload.ends_gathered else 0,
        masters,
        moments,
        held,
        round(workload.logits.value * tokens * network.vocab / split),
        gathered if _split(workload) else 0,
        "the loss",
    )


def _at_the_last_layer(workload: Workload) -> Part:
    """The last layer has recomputed what it did not keep. Two layers and the embeddings are gathered, and the layer's
    gradient exists in bf16, and in fp32 to be reduced."""
    network = workload.network
    weights, masters, moments = _states(workload)
    layer = layer_parameters(network, workload.tensor).total
    again = megatron.layer_bytes(replace(workload, recompute=Recompute.none), copies=1)
    held = network.layers * layer_bytes(workload) + again
    gathered = GATHERED * (2 * layer + 2 * ends(workload)) + (GATHERED + 4) * layer if _split(workload) else 0
    grads = 0 if workload.accumulation == 1 else _gradients(workload)
    return Part(weights, grads, masters, moments, held, 0, gathered, "the backward of the last layer")


def _at_the_end(workload: Workload) -> Part:
    """The embedding and the output projection are reduced last: beside their gathered weights, their gradients exist in
    bf16, and in fp32 to be reduced."""
    weights, masters, moments = _states(workload)
    reduced = (2 * GATHERED + 4) * ends(workload) if _split(workload) else 0
    return Part(weights, _gradients(workload), masters, moments, 0, 0, reduced, "the end of the backward")
