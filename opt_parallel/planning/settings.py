"""The typed configuration of a cluster, which the files of configs/cluster/ set."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from opt_parallel.config.model import Section, require
from opt_parallel.planning.cluster import GIB, Cluster, Device, Link, OnCpu, Rates

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
POSITIVE = {  # the unit of each key that must not be 0
    "memory": "GiB", "bandwidth": "GB/s", "within": "GB/s", "between": "GB/s", "to_host": "GB/s", "host_memory": "GiB",
    "storage": "GB/s",
}  # fmt: skip
MEASURED = {"memory", "bandwidth", "within", "host_memory"}  # of these, on the CPUs of this machine
LINKS = {"within": 1.0, "between": 0.8}  # shares of a CPU's links that large collectives reach; 0.8 is an estimate


@dataclass
class ClusterConfig(Section):
    """Hosts, devices and links, in the units of their data sheets. The comments of configs/cluster/ explain the keys.

    With `cpu`, zeros are measured on this machine before the plan is computed."""

    cpu: bool = False
    device: str = ""
    nodes: int = 1
    gpus: int = 8
    memory: float = 0.0
    bf16: float = 0.0
    fp8: float = 0.0
    fp32: float = 0.0
    bandwidth: float = 0.0
    within: float = 0.0
    within_latency: float = 0.0
    between: float = 0.0
    between_latency: float = 0.0
    to_host: float = 0.0
    host_memory: float = 0.0
    storage: float = 0.0
    failures: float = 0.0
    restart: float = 0.0
    price: float | None = None
    measured: dict[str, float] = field(default_factory=dict)  # a CPU's values of `Rates` and `OnCpu` by their names

    def check(self) -> None:
        for name in ("nodes", "gpus"):
            require(getattr(self, name) >= 1, f"cluster.{name}={getattr(self, name)} must be at least 1")
        require(
            self.nodes * self.gpus <= 2**16,
            f"cluster.nodes={self.nodes} × cluster.gpus={self.gpus} are {self.nodes * self.gpus:,} devices, more than "
            "the maximum of 65,536: plan fewer",
        )
        for name, unit in POSITIVE.items():
            measured = self.cpu and name in MEASURED
            value = getattr(self, name)
            require(value > 0 or measured, f"cluster.{name}={value} must be positive: {unit}")
        for name in ("memory", "bf16", "fp8", "fp32", "bandwidth", "within", "within_latency", "between_latency",
                     "host_memory", "failures", "restart", "price"):  # fmt: skip
            require((getattr(self, name) or 0) >= 0, f"cluster.{name}={getattr(self, name)} must not be negative")

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus

    def cluster(self) -> Cluster:
        """The cluster in bytes, seconds and FLOP/s."""
        peak = {"bf16": self.bf16 * TERA, "fp16": self.bf16 * TERA, "fp32": self.fp32 * TERA}
        if self.fp8:
            peak["fp8"] = self.fp8 * TERA
        return Cluster(
            Device(self.device, round(self.memory * GIB), peak, self.bandwidth * GIGA, self._rates()),
            self.nodes,
            self.gpus,
            Link(self.within * GIGA, self.within_latency * MICRO),
            Link(self.between * GIGA, self.between_latency * MICRO),
            self.to_host * GIGA,
            self.storage * GIGA,
            round(self.host_memory * GIB),
            self.price,
        )

    def _rates(self) -> Rates | None:
        """The rates of a measured CPU, whose peak is that of its measured products."""
        if not self.measured:
            return None
        of_cpu = {each.name: self.measured[each.name] for each in fields(OnCpu)}
        rates = {name: value for name, value in self.measured.items() if name not in of_cpu}
        return Rates(product=1.0, fp8=0.0, **rates, **LINKS, on_cpu=OnCpu(**of_cpu))


def any_cluster() -> ClusterConfig:
    """A valid cluster, whose values a file of configs/cluster/ replaces."""
    return ClusterConfig(memory=1.0, bandwidth=1.0, within=1.0, between=1.0, to_host=1.0, host_memory=1.0, storage=1.0)


@dataclass
class PlanKeys(Section):
    """The keys of `opt-parallel plan` beside those of `train`."""

    cluster: ClusterConfig = field(default_factory=any_cluster)
    rehearse: bool = False
