"""Seconds of the exchange over data ranks and between pipeline stages, and of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.cluster import Cluster, Link
from opt_parallel.planning.fsdp import ends
from opt_parallel.planning.layer_time import Layer, collective, exposed
from opt_parallel.planning.parameters import embedding_parameters, layer_parameters, lora_parameters
from opt_parallel.planning.rates import HIDDEN, HOST_MEMORY, beside, rates_of
from opt_parallel.planning.states import rank_parameters
from opt_parallel.planning.workload import Trainer, Workload


def data_bytes(workload: Workload) -> dict[str, float]:
    """Bytes of the full tensors that this trainer sends over the data ranks in a step, by collective.

    ZeRO-3 gathers a parameter for the forward and for the backward of each micro-batch, and the tied embedding also for
    the output projection. It gathers up to a layer less, because weights that are used again soon stay gathered. Small
    vectors are gathered once, after the update."""
    every, micros = rank_parameters(workload), workload.accumulation
    gradients = 4 * (lora_parameters(workload) if workload.lora else every)
    if workload.data == 1:
        return {}
    if workload.stage == 0:
        return {"all-reduce": gradients}
    if workload.stage < 3:
        return {"reduce": gradients * micros, "all-gather": workload.states.weight * gradients / 4}
    kept = _kept_whole(workload)
    gathered = 2 * (every - kept) + embedding_parameters(workload.network, workload.tensor)
    return {
        "reduce-scatter": gradients * micros,
        "all-gather": workload.states.weight * (gathered * micros + kept),
    }


def _kept_whole(workload: Workload) -> int:
    """Elements of the biases and normalisations that ZeRO-3 does not split, because they are small."""
    network, tensor = workload.network, workload.tensor
    biases = [3 * network.queries // tensor, network.hidden, network.ffn // tensor, network.hidden]
    norms = [network.hidden] * network.norm
    vectors = [*(biases if network.biases else []), *norms, *norms]
    last = norms if network.final_norm else []
    return network.layers * sum(each for each in vectors if each <= workload.persistence) + sum(
        each for each in last if each <= workload.persistence
    )


@dataclass(frozen=True)
class Exchange:
    """The messages of one rank outside its tensor group."""

    workload: Workload
    cluster: Cluster

    @property
    def trained(self) -> float:
        """The parameters that the optimizer updates on a rank, before ZeRO splits them. LoRA's base is frozen."""
        workload, network = self.workload, self.workload.network
        layers = network.layers / workload.pipeline
        if workload.lora:
            return lora_parameters(workload) * layers / network.layers
        own = layers * layer_parameters(network, workload.tensor).total
        return own + embedding_parameters(network, workload.tensor)

    @property
    def beside(self) -> float:
        """The share of a data group's collective by which it slows what is computed beside it."""
        return beside(self.cluster.device, by_ports=self.cluster.per_host <= self.workload.tensor)

    def ring(self, size: float) -> float:
        """Seconds to gather a tensor of `size` bytes over the data ranks. All ranks of a host that belong to one data
        group share the bytes that leave the host, and each has its own port of the network."""
        workload, cluster, rates = self.workload, self.cluster, rates_of(self.cluster.device, self.workload)
        ranks, inside = workload.data * workload.context, max(1, cluster.per_host // workload.tensor)
        if ranks <= inside:
            return collective(size, ranks, cluster.within, rates.within)
        hosts, here = ranks / inside, min(inside, ranks)
        if workload.trainer is Trainer.deepspeed:  # one ring through all hosts, by one port
            hosts, here = ranks, 1
        link = Link(cluster.between.bandwidth * here, cluster.between.latency)
        crossing = collective(size, max(2, round(hosts)), link, rates.between)
        return max(crossing, collective(size, here, cluster.within, rates.within))

    def exposed(self, layer: Layer, stage: float) -> float:
        """Seconds of a step in which a rank waits for its data group."""
        workload = self.workload
        if workload.data * workload.context == 1:
            return 0.0
        if workload.trainer is Trainer.ours:
            return self._of_this_trainer_at_stage_3(layer) if workload.stage == 3 else self._of_this_trainer(layer)
        if workload.stage == 3:
            return self._gathering(layer, stage)
        gradients, weights = (each * self.trained for each in (workload.states.gradient, workload.states.weight))
        total = self.ring(gradients) + self.ring(weights if workload.stage else gradients)
        if workload.stage == 0:
            return total
        computed = stage * layer.total  # beside the last backward and the first forward
        return max(0.0, total - computed) + HIDDEN * min(total, computed)

    def _of_this_trainer(self, layer: Layer) -> float:
        """Stages 0 to 2 (`gradients.py`): at stages 1 and 2, the fp32 gradients are summed over the data ranks
        while each backward runs. The gathering of the updated weights and the all-reduce of stage 0 overlap nothing."""
        workload, sent = self.workload, data_bytes(self.workload)
        if workload.stage == 0:
            return 2 * self.ring(sent["all-reduce"])
        reduce = self.ring(sent["reduce"] / workload.accumulation)
        backward = workload.network.layers * layer.total * (1 - layer.forward)
        return workload.accumulation * exposed(reduce, backward, self.beside) + self.ring(sent["all-gather"])

    def _of_this_trainer_at_stage_3(self, layer: Layer) -> float:
        """Each layer's weights are gathered in the forward and in the backward of every micro-batch, and its gradients
        are reduced, each beside the computation of another layer. The rest of `data_bytes` counts as if nothing hid
        it: the embeddings, which the first and the last operation of a micro-batch wait for, their gradients, which are
        computed last, and the small vectors after the update."""
        workload, sent = self.workload, data_bytes(self.workload)
        layers, micros = workload.network.layers, workload.accumulation
        own = layer_parameters(workload.network, workload.tensor).total
        weights = workload.states.weight * (own - _kept_whole(workload) / layers)
        gradients = 4 * (lora_parameters(workload) / layers if workload.lora else own)
        rest = sum(sent.values()) - layers * micros * (2 * weights + gradients)
        gather, reduce = self.ring(weights), self.ring(gradients)
        forward, backward = layer.total * layer.forward, layer.total * (1 - layer.forward)
        hidden = exposed(gather, forward, self.beside) + exposed(gather + reduce, backward, self.beside)
        return layers * micros * hidden + self.ring(rest)

    def _gathering(self, layer: Layer, stage: float) -> float:
        """FSDP and DeepSpeed gather each layer's weights in the forward and in the backward of every micro-batch, and
        reduce its gradients, each beside the computation of another layer. What the computation does not hide is
        exposed, and what it hides slows it. Nothing hides FSDP's exchange of the embedding and the output projection:
        the first operation of a micro-batch waits for them, and their gradients are the last."""
        workload = self.workload
        own = layer_parameters(workload.network, workload.tensor).total
        gather, reduce = self.ring(workload.value * own), self.ring(workload.reduced * own)
        forward, backward = layer.total * layer.forward, layer.total * (1 - layer.forward)
        micros = workload.accumulation
        reductions = 1 if not workload.gradients_split else micros
        rest = 0.0
        if workload.trainer is Trainer.fsdp:
            elements, times = ends(workload), micros if workload.ends_gathered else 2 * micros
            rest = times * self.ring(workload.value * elements) + reductions * self.ring(workload.reduced * elements)
        return rest + stage * (
            micros * exposed(gather, forward, self.beside)
            + (micros - reductions) * exposed(gather, backward, self.beside)
            + reductions * exposed(gather + reduce, backward, self.beside)
        )

    def piped(self) -> float:
        """Seconds in which a stage sends and receives the hidden states of its micro-batches."""
        workload, cluster = self.workload, self.cluster
        if workload.pipeline == 1:
            return 0.0
        tokens = workload.micro * workload.length / workload.context
        size = workload.value * tokens * workload.network.hidden
        if workload.trainer is Trainer.megatron and workload.scattered:
            size /= workload.tensor  # each rank of a tensor group sends its part (Narayanan et al. 2021, section 4.1)
        rates = rates_of(cluster.device, workload)
        inside = workload.devices <= cluster.per_host
        link, share = (cluster.within, rates.within) if inside else (cluster.between, rates.between)
        each = size / (link.bandwidth * share) + link.latency
        return 2 * workload.accumulation * workload.virtual * each

    def optimizer(self) -> float:
        """Seconds of the update: reads and writes of the states (weight, gradient, master and both moments)."""
        workload, states = self.workload, self.workload.states
        own = self.trained
        shards = workload.data * workload.context if workload.stage else 1
        moved = own / shards * (2 * (states.master + states.moments) + states.weight + 2 * states.gradient)
        if workload.trainer is not Trainer.megatron or not workload.scattered:  # Megatron's product adds to the sum
            kept = own / (shards if workload.gradients_split else 1)
            moved += kept * workload.accumulation * (states.weight + 8)
        if workload.offload:
            return moved / HOST_MEMORY
        rates = rates_of(self.cluster.device, workload)
        if rates.on_cpu:
            return rates.on_cpu.update * own / shards
        return moved / (self.cluster.device.bandwidth * rates.memory)
