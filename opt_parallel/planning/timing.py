"""The time of an optimizer step, by what takes it.

Matrix products run at a share of the device's peak, element-wise operations at a share of its memory bandwidth, and
collectives at a share of the links' (a roofline: Williams et al. 2009). A collective is hidden by what is computed
beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.exchange import Exchange
from opt_parallel.planning.layer_time import head_of, layer_of
from opt_parallel.planning.offload import offloaded_inputs, offloaded_states
from opt_parallel.planning.parameters import model_flops, recomputed_flops
from opt_parallel.planning.rates import rates_of
from opt_parallel.planning.workload import Workload


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step on the slowest rank. Collectives count as far as nothing is computed beside them.

    `offload` are the copies to the host's memory and back. `pipeline` is the time in which a stage waits for others.
    `launching` is the time in which the device waits for the host, on a CPU the host's own time. `data` is the exchange
    of gradients and weights over the data ranks, and `checkpoint` the stall of saving, spread over the steps. Texts are
    read and copied while the device computes. FLOPs are those of one device in a step; `hardware_flops` include what is
    computed again. `peak` is the device's peak in FLOP/s, `tokens` the tokens of a step on `devices` devices."""

    products: float
    attention: float
    elementwise: float
    launching: float
    tensor: float
    data: float
    offload: float
    pipeline: float
    optimizer: float
    checkpoint: float
    model_flops: float
    hardware_flops: float
    peak: float
    tokens: int
    devices: int

    def parts(self) -> dict[str, float]:
        """Seconds by what takes them."""
        names = list(self.__dataclass_fields__)
        return {name: getattr(self, name) for name in names[: names.index("checkpoint") + 1]}

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.parts().values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of one device."""
        return self.tokens / self.step / self.devices

    @property
    def mfu(self) -> float:
        """The share of the peak that the model's FLOPs reach, without recomputation."""
        return self.model_flops / self.step / self.peak

    @property
    def hfu(self) -> float:
        """The share of the peak that all FLOPs reach, with recomputation."""
        return self.hardware_flops / self.step / self.peak


def time_of(workload: Workload, cluster: Cluster) -> Time:
    """The time of one step."""
    layer, head = layer_of(workload, cluster), head_of(workload, cluster)
    stage = workload.network.layers / workload.pipeline
    micros = workload.accumulation
    exchange = Exchange(workload, cluster)
    tokens = workload.tokens / workload.devices
    model, again = model_flops(workload) * tokens, recomputed_flops(workload) * tokens

    def in_all(name: str) -> float:
        """Seconds of the micro-batches' forwards and backwards in the layers of a stage and in the head."""
        return micros * (stage * getattr(layer, name) + getattr(head, name))

    found = Time(
        products=in_all("products"),
        attention=in_all("attention"),
        elementwise=in_all("elementwise"),
        launching=0.0,
        tensor=in_all("tensor"),
        data=exchange.exposed(layer, stage),
        offload=offloaded_inputs(workload, cluster, layer) + offloaded_states(workload, cluster),
        pipeline=(workload.pipeline - 1) / workload.virtual * stage * layer.total + exchange.piped(),
        optimizer=exchange.optimizer(),
        checkpoint=0.0,
        model_flops=model,
        hardware_flops=model + again,
        peak=cluster.device.peak["bf16" if workload.precision == "fp8" else workload.precision],
        tokens=workload.tokens,
        devices=workload.devices,
    )
    rates = rates_of(cluster.device, workload)
    host = rates.host * micros * stage * (1 + (workload.pipeline - 1) / micros)
    return replace(found, launching=host if rates.on_cpu else max(0.0, host - found.step))
