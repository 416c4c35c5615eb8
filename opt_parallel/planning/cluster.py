"""What a plan is computed on: devices, the links between them, and what published data sheets say of them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class OnCpu:
    """Seconds of this trainer's operations on a CPU that has been measured, in fp32, forward and backward together.

    `dropout` and `eager_dropout` are those of hidden dropout for an element, compiled and not. `score` is that of
    unfused attention for a score, beside its products: softmax, mask and dropout. `logit` is that of the loss for a
    logit, beside its products. `embedding` is that of adding the two gradients of the tied embedding, for an element.
    `update` is that of a step's update for a parameter: its gradient's copy and norm, and AdamW."""

    dropout: float
    eager_dropout: float
    score: float
    logit: float
    embedding: float
    update: float


@dataclass(frozen=True)
class Rates:
    """What a device reaches, as a share of its data sheet.

    `product` is that of large matrix products in bf16, `fp8` the same in fp8; a product one of whose dims is `small`
    reaches half of it. `attention` is that of a fused kernel's forward, counted without the masked half; the backward
    reaches `attention_backward`. `memory` is that of the memory bandwidth in element-wise operations. `within` and
    `between` are those of the links in large collectives. `host` are the seconds in which the host launches the kernels
    of one layer's forward and backward. A CPU computes nothing meanwhile, and has further costs `on_cpu`."""

    product: float
    fp8: float
    small: float
    attention: float
    attention_backward: float
    memory: float
    within: float
    between: float
    host: float
    on_cpu: OnCpu | None = None


@dataclass(frozen=True)
class Device:
    """A device. `peak` maps a precision to FLOP/s of dense matrix products, from the maker's data sheet. `memory` is
    the total that the driver reports, in bytes. `bandwidth` is that of the device's memory in bytes/s. `rates` are
    those of a measured CPU; else `rates.py` has them by family."""

    name: str
    memory: int
    peak: dict[str, float]
    bandwidth: float
    rates: Rates | None = None

    @property
    def is_cpu(self) -> bool:
        return self.rates is not None


@dataclass(frozen=True)
class Link:
    """Bytes/s that one device sends while it receives as many, and the seconds until a message of no bytes arrives."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """`nodes` hosts of `per_host` devices. `within` links devices of one host, `between` those of two hosts.
    `to_host` are the bytes/s that a device copies to its host, and as many back, and `storage` those that all hosts
    together read and write checkpoints with. `host_memory` is in bytes, `price` in dollars for a device and hour, None
    if unknown."""

    device: Device
    nodes: int = 1
    per_host: int = 8
    within: Link = Link(300e9, 5e-6)
    between: Link = Link(25e9, 12e-6)
    to_host: float = 32e9
    storage: float = 10e9
    host_memory: int = 1024 * GIB
    price: float | None = None

    @property
    def devices(self) -> int:
        return self.nodes * self.per_host


def _peak(dense: float, fp8: float = 0.0, fp32: float = 0.0) -> dict[str, float]:
    """Peak rates from TFLOP/s in bf16 and fp16, in fp8, and in fp32 (TF32 is not used)."""
    rates = {"bf16": dense * 1e12, "fp16": dense * 1e12, "fp32": fp32 * 1e12}
    return rates | ({"fp8": fp8 * 1e12} if fp8 else {})


# Dense rates, memory and bandwidths: NVIDIA's data sheets of A100, H100, H200, HGX B200 and GB200.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", round(39.4 * GIB), _peak(312, fp32=19.5), 1.555e12),
        Device("a100-80gb", round(79.2 * GIB), _peak(312, fp32=19.5), 2.039e12),
        Device("h100-80gb", round(79.1 * GIB), _peak(989, 1979, 67), 3.35e12),
        Device("h100-96gb", round(95.0 * GIB), _peak(989, 1979, 67), 2.4e12),
        Device("h100-96gb-500w", round(95.0 * GIB), _peak(989, 1979, 67), 2.4e12),
        Device("h200-141gb", round(139.7 * GIB), _peak(989, 1979, 67), 4.8e12),
        Device("b200-180gb", round(178.0 * GIB), _peak(2250, 4500, 75), 7.7e12),
        Device("gb200-186gb", round(184.0 * GIB), _peak(2500, 5000, 80), 8.0e12),
    )
}
