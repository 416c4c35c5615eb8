"""The typed `launch` configuration: one section for each system of `configs/launch/`. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from opt_parallel.config.model import Section, require
from opt_parallel.config.paths import PATH
from opt_parallel.config.units import bytes_of
from opt_parallel.runtime.errors import UserError

TIME_FORMATS = {  # from the manual of sbatch
    r"(?P<m>\d+)(:(?P<s>\d+))?": "minutes or minutes:seconds",
    r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)": "hours:minutes:seconds",
    r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+))?(:(?P<s>\d+))?": "days-hours, days-hours:minutes, …",
}
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
DNS_LABEL = r"[a-z]([-a-z0-9]{0,55}[a-z0-9])?"  # RFC 1035, for Services; shorter by the -0, -1, … of pods


class System(Enum):
    torchrun = "torchrun"
    slurm = "slurm"
    deepspeed = "deepspeed"
    accelerate = "accelerate"
    kubernetes = "kubernetes"


@dataclass
class Launch(Section):
    """Settings of every system. `nodes`: number of machines, for torchrun also `fewest:most`. `processes`: on each
    machine. `interface`: network interface of gloo and NCCL; None: their choice. `dry_run`: only print what would be
    started."""

    system: System = System.torchrun
    nodes: str = "1"
    processes: int = 1
    interface: str | None = None
    dry_run: bool = False

    def check(self) -> None:
        require(
            re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.nodes) is not None and self.fewest <= self.most,
            f"launch.nodes={self.nodes} is not a number of machines: write 2, or for torchrun 1:2 (one or two)",
        )
        require(
            self.fewest == self.most or self.system is System.torchrun,
            f"launch.nodes={self.nodes}: {self.system.value} starts a fixed number of machines, write one "
            "number; launch=torchrun can continue with fewer",
        )
        require(self.processes >= 1, f"launch.processes={self.processes} must be at least 1")

    @property
    def fewest(self) -> int:
        return int(self.nodes.partition(":")[0])

    @property
    def most(self) -> int:
        return int(self.nodes.rpartition(":")[2])


@dataclass
class Elastic(Launch):
    """torchrun's settings on every system. `shutdown_timeout`: seconds that the processes have to save after a signal.
    `restarts`: how often a machine restarts its processes, each time from the newest complete checkpoint.
    `rendezvous_timeout`: seconds that machines wait for each other at the start and during a network outage."""

    shutdown_timeout: int = 600
    restarts: int = 3
    rendezvous_timeout: int = 600

    def check(self) -> None:
        super().check()
        require(self.shutdown_timeout >= 1, f"launch.shutdown_timeout={self.shutdown_timeout} must be at least 1")
        require(self.restarts >= 0, f"launch.restarts={self.restarts} must not be negative (0: never)")
        require(self.rendezvous_timeout >= 1, f"launch.rendezvous_timeout={self.rendezvous_timeout} must be at least 1")


@dataclass
class Torchrun(Elastic):
    """`endpoint`: `HOST[:PORT]` of the rendezvous; HOST is one of the machines."""

    endpoint: str | None = None

    def check(self) -> None:
        super().check()
        require(
            self.nodes == "1" or self.endpoint is not None,
            f"launch.nodes={self.nodes} machines need a rendezvous: set launch.endpoint=HOST:29500 to one of them",
        )
        require(
            self.endpoint is None or re.fullmatch(r"[^:\s]+(:\d+)?", self.endpoint) is not None,
            f"launch.endpoint={self.endpoint} is not an endpoint: write HOST or HOST:29500",
        )


@dataclass
class Slurm(Elastic):
    """`warning`: the run saves and ends this many seconds before the time limit. `venv`: the virtual environment with
    this package; None: the one that submits. `container`: an Apptainer image instead. `options`: further sbatch
    options."""

    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    account: str | None = None
    partition: str | None = None
    time: str | None = None
    warning: int = 600
    venv: str | None = field(default=None, metadata=PATH)
    container: str | None = None
    options: list[str] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        require(self.gpus_per_node >= 0, f"launch.gpus_per_node={self.gpus_per_node} must not be negative (0: none)")
        require(
            self.gpus_per_node in (0, self.processes),
            f"launch.processes={self.processes} on launch.gpus_per_node={self.gpus_per_node} GPUs: each process uses "
            "one GPU: give both the same number, or 0 GPUs to train on CPUs",
        )
        require(
            self.cpus_per_task is None or self.cpus_per_task >= 1,
            f"launch.cpus_per_task={self.cpus_per_task} must be at least 1",
        )
        require(self.warning >= 1, f"launch.warning={self.warning} must be at least 1")
        if self.time is not None:
            limit = seconds_of(self.time)
            require(
                limit > self.warning,
                f"launch.time={self.time} is {limit} seconds, of which launch.warning={self.warning} leaves none to "
                "train: ask for more time, or for a shorter warning",
            )
        require(
            self.venv is None or self.container is None,
            f"launch.venv={self.venv} and launch.container={self.container} both set the environment: set one to null",
        )
        for option in self.options:
            require(
                re.fullmatch(r"--[a-z][-a-z]*(=[^\n]+)?", option) is not None,
                f"launch.options={self.options}: {option!r} is not an option of sbatch: write --name or --name=value",
            )


@dataclass
class DeepSpeed(Launch):
    """`hostfile`: one `HOST slots=N` a line; None: this machine only. `address`: the first machine's; None: DeepSpeed
    runs `hostname -I` there."""

    hostfile: str | None = field(default=None, metadata=PATH)
    address: str | None = None
    port: int = 29500

    def check(self) -> None:
        super().check()
        require(
            self.most == 1 or self.hostfile is not None,
            f"launch.nodes={self.nodes} machines: list them in a file, launch.hostfile=…, one `HOST slots=N` a line",
        )


@dataclass
class Accelerate(Launch):
    """`config`: accelerate's configuration file. `rank`: this machine's index. `address`: machine 0's.
    `shutdown_timeout`: seconds that the processes have to save after a signal."""

    config: str | None = field(default=None, metadata=PATH)
    shutdown_timeout: int = 600
    rank: int = 0
    address: str | None = None
    port: int = 29500

    def check(self) -> None:
        super().check()
        require(self.shutdown_timeout >= 1, f"launch.shutdown_timeout={self.shutdown_timeout} must be at least 1")
        require(self.config is not None, "launch.config is not set: choose a file of launch/accelerate/")
        require(0 <= self.rank < self.most, f"launch.rank={self.rank} must lie between 0 and {self.most - 1}")
        require(
            self.most == 1 or self.address is not None,
            f"launch.nodes={self.nodes} machines need a rendezvous: set launch.address=… to machine 0's address",
        )


@dataclass
class Kubernetes(Elastic):
    """`code`: path of this repository in the image. `claim`, `mount`: the PersistentVolumeClaim that all pods share,
    and its mount path, the run's working folder. `secret`: a Secret whose entries become environment variables.
    `grace`: seconds between a pod's SIGTERM and SIGKILL. `backoff`: number of failed pods that the Job replaces."""

    name: str | None = None
    namespace: str = "default"
    image: str | None = None
    code: str = "/opt/opt-parallel"
    gpus: int = 0
    cpus: int = 1
    memory: str = "4Gi"
    claim: str | None = None
    mount: str = "/data"
    secret: str | None = None
    grace: int = 660
    backoff: int = 6

    def check(self) -> None:
        super().check()
        for key, example in (("name", "opt-13b"), ("image", "registry.example/opt:1"), ("claim", "runs")):
            require(
                getattr(self, key) is not None, f"launch.{key} is not set: write, for example, launch.{key}={example}"
            )
        for key in ("name", "namespace"):
            value = getattr(self, key)
            require(
                re.fullmatch(DNS_LABEL, value) is not None,
                f"launch.{key}={value} is not a Kubernetes name: use lowercase letters, digits and -, at most 57",
            )
        for key in ("code", "mount"):
            value = getattr(self, key)
            require(value.startswith("/"), f"launch.{key}={value} must be an absolute path, from /")
        require(
            self.gpus in (0, self.processes),
            f"launch.processes={self.processes} on launch.gpus={self.gpus} GPUs: each process uses one GPU: give both "
            "the same number, or 0 GPUs to train on CPUs",
        )
        require(self.cpus >= 1, f"launch.cpus={self.cpus} must be at least 1")
        bytes_of(self.memory, "launch.memory=")
        require(
            self.grace > self.shutdown_timeout,
            f"launch.grace={self.grace} kills a pod before launch.shutdown_timeout={self.shutdown_timeout} s to save "
            "are over: make it larger",
        )
        require(self.backoff >= 0, f"launch.backoff={self.backoff} must not be negative (0: none)")


SECTIONS: dict[System, type[Launch]] = {
    System.torchrun: Torchrun,
    System.slurm: Slurm,
    System.deepspeed: DeepSpeed,
    System.accelerate: Accelerate,
    System.kubernetes: Kubernetes,
}


def seconds_of(time: str) -> int:
    """Seconds of a time limit in Slurm's notation. Raises: UserError."""
    for pattern in TIME_FORMATS:
        if match := re.fullmatch(pattern, time):
            return sum(SECONDS[unit] * int(number) for unit, number in match.groupdict().items() if number)
    raise UserError(f"launch.time={time} is not a time limit: write {'; '.join(TIME_FORMATS.values())}")
