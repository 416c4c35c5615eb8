"""The shares of its data sheet that a device reaches, fitted to published measurements, by family of device.

docs/planning-formulas.md names the measurements.
"""

from __future__ import annotations

from dataclasses import replace

from opt_parallel.planning.cluster import Device, Rates
from opt_parallel.planning.workload import Trainer, Workload

# No measurement of B200 was fitted, so it has the shares of H100, except in fp8 and of the host's time.
_A100 = Rates(
    product=0.79, fp8=0.0, small=180, attention=0.40, attention_backward=0.31, memory=0.65, within=0.92, between=0.82,
    host=6e-3,
)  # fmt: skip
_H100 = Rates(
    product=0.59, fp8=0.68, small=160, attention=0.65, attention_backward=0.50, memory=0.65, within=0.54, between=0.92,
    host=4e-3,
)  # fmt: skip
RATES = {
    "a100": _A100,
    "h100": _H100,
    "h200": replace(_H100, product=0.82, within=0.44, between=0.58),
    "b200": replace(_H100, fp8=0.55, host=5.5e-3),
}
UNFITTED = "a100"  # whose shares other devices take
FP8_SMALL = 220.0  # as `small`, of products in fp8, with the conversion of their inputs
TORCH_ATTENTION = 0.92  # of the rate of Megatron's attention on Hopper: torch's scaled_dot_product_attention
# Forward and backward of FlashAttention-2, which does not use Hopper's own instructions (35% of an H100: Shah et al.
# 2024, arXiv 2407.08608). The backward is fitted.
FLASH2, FLASH2_BACKWARD = 0.35, 0.25
POWER = 0.95  # of the rates of an H100 of 700 W, at 500 W
# Of a collective's time, by which it slows the products beside it: in rings that pass the links within a host, whose
# kernels take many of the device's processors, and in rings that use the ports between hosts alone.
BESIDE, BESIDE_PORTS = 0.42, 0.1
HIDDEN = 0.21  # the same for Megatron's gradients and weights, beside the last backward and the first forward
PIECES, TORCH_PIECES = 0.17, 0.6  # of the tensor group's collectives is left if they run in pieces beside products
TO_HOST = 0.75  # of the link to the host, in copies of tensors of many MB; an estimate
HOST_MEMORY = 50e9  # bytes/s with which a process updates an offloaded optimizer on the CPU; an estimate
LOGIT_BYTES, COMPILED_LOGIT_BYTES = 60.0, 20.0  # read and written for a logit, in its loss and gradient


def _family(device: Device) -> str:
    return device.name.removeprefix("g").partition("-")[0]


def is_fitted(device: Device) -> bool:
    """Whether the rates of the device were measured, or fitted to published runs."""
    return device.rates is not None or _family(device) in RATES


def beside(device: Device, by_ports: bool = False) -> float:
    """The share of a collective's time by which it slows what is computed beside it. `by_ports` is true if each device
    sends only by its own port of the network. On a CPU the same cores compute and send."""
    if device.is_cpu:
        return 1.0
    return BESIDE_PORTS if by_ports else BESIDE


def rates_of(device: Device, workload: Workload) -> Rates:
    """The rates of a device, by the family that its name begins with. A measured device names its own, and a
    family without rates takes those of UNFITTED."""
    if device.rates is not None:
        return device.rates
    rates = RATES.get(_family(device), RATES[UNFITTED])
    if workload.trainer is not Trainer.megatron and rates.fp8:
        attention, backward = rates.attention * TORCH_ATTENTION, rates.attention_backward * TORCH_ATTENTION
        if workload.flash2:
            attention, backward = FLASH2, FLASH2_BACKWARD
        rates = replace(rates, attention=attention, attention_backward=backward)
    if "500w" in device.name:
        shares = {key: getattr(rates, key) * POWER for key in ("product", "fp8", "attention", "attention_backward")}
        rates = replace(rates, **shares)
    return rates
