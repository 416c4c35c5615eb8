"""The time of an optimizer step, by what takes it."""

from __future__ import annotations

from dataclasses import dataclass

from opt_parallel.planning.cluster import Cluster
from opt_parallel.planning.parameters import forward_flops, model_flops
from opt_parallel.planning.workload import Recompute, Workload


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step on the slowest rank. Collectives count as far as nothing is computed beside them.

    `pipeline` is the time in which a stage waits for others. `launching` is the time in which the device waits for the
    host. `data` is the exchange of gradients and weights over the data ranks, `input` reading text, and `checkpoint`
    the stall of saving, spread over the steps. FLOPs are those of one device in a step; `hardware_flops` include what
    is computed again. `peak` is the device's peak in FLOP/s, `tokens` the tokens of a step on `devices` devices."""

    products: float
    attention: float
    elementwise: float
    launching: float
    tensor: float
    data: float
    pipeline: float
    optimizer: float
    input: float
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
    tokens = workload.tokens / workload.devices
    products, attention, head = forward_flops(workload.network, workload.length)
    again = (products + attention) if workload.recompute in (Recompute.full, Recompute.offload) else 0.0
    model = model_flops(workload) * tokens
    peak = cluster.device.peak[workload.precision]
    return Time(
        products=3 * (products + head) * tokens / peak / 0.7,
        attention=3 * attention * tokens / peak / 0.4,
        elementwise=again * tokens / peak / 0.7,
        launching=0.0,
        tensor=0.0,
        data=0.0,
        pipeline=0.0,
        optimizer=0.0,
        input=0.0,
        checkpoint=0.0,
        model_flops=model,
        hardware_flops=model + again * tokens,
        peak=peak,
        tokens=workload.tokens,
        devices=workload.devices,
    )
