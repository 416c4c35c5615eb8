"""The typed `launch` configuration, with one class for each file of `configs/launch/`. This module does not import
torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from opt_parallel.config.model import Section, require
from opt_parallel.config.paths import PATH
from opt_parallel.config.units import bytes_of
from opt_parallel.runtime.errors import UserError

# the repository's folder `launch`, which is also a part of the package
TEMPLATES = (Path(__file__).parent / "templates").resolve()
# accelerate's configurations in TEMPLATES / "accelerate"
ACCELERATE = ("cpu-one.yaml", "cpu-many.yaml", "gpu-one.yaml", "gpu-many.yaml")
TIME_FORMATS = {  # time formats from the manual of sbatch
    r"(?P<m>\d+)(:(?P<s>\d+))?": "minutes or minutes:seconds",
    r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)": "hours:minutes:seconds",
    r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+))?(:(?P<s>\d+))?": "days-hours, days-hours:minutes, …",
}
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
DNS_LABEL = r"[a-z]([-a-z0-9]{0,55}[a-z0-9])?"  # a name by RFC 1035, with room for the suffix -0, -1, … of a pod


class System(Enum):
    torchrun = "torchrun"
    slurm = "slurm"
    deepspeed = "deepspeed"
    accelerate = "accelerate"
    kubernetes = "kubernetes"


@dataclass
class Launch(Section):
    """Settings of every launch system. `nodes` is the number of nodes, or a range `fewest:most` for torchrun.
    `processes` is the number of processes on each node. `interface` is the network interface of gloo and NCCL, which
    choose an interface themselves if it is None. `dry_run` prints the command or script and starts nothing."""

    system: System = System.torchrun
    nodes: str = "1"
    processes: int = 1
    interface: str | None = None
    dry_run: bool = False

    def check(self) -> None:
        require(
            re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.nodes) is not None and self.fewest <= self.most,
            f"launch.nodes={self.nodes} is not a number of nodes: write 2, or for torchrun 1:2 (one or two)",
        )
        require(
            self.fewest == self.most or self.system is System.torchrun,
            f"launch.nodes={self.nodes}: {self.system.value} starts a fixed number of nodes: write one "
            "number, or use launch=torchrun, which can continue with fewer nodes",
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
    """Settings of torchrun, which several launch systems use. `shutdown_timeout` is the number of seconds that the
    processes have to save a checkpoint after a signal. `restarts` is the maximum number of times that the processes are
    restarted, each time from the newest complete checkpoint. `rendezvous_timeout` is the number of seconds that nodes
    wait for each other at the start and during a network outage."""

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
    """torchrun on one or several nodes. `endpoint` is the address `HOST[:PORT]` of the rendezvous, where HOST is one of
    the nodes."""

    endpoint: str | None = None

    def check(self) -> None:
        super().check()
        require(
            self.nodes == "1" or self.endpoint is not None,
            f"launch.nodes={self.nodes} needs a rendezvous: set launch.endpoint=HOST:29500 to one of the nodes",
        )
        require(
            self.endpoint is None or re.fullmatch(r"[^:\s]+(:\d+)?", self.endpoint) is not None,
            f"launch.endpoint={self.endpoint} is not an endpoint: write HOST or HOST:29500",
        )


@dataclass
class Slurm(Elastic):
    """torchrun in a Slurm job. The run saves and ends `warning` seconds before the job's time limit. `venv` is the
    virtual environment with this package, by default the environment of the submitting process. `container` is an
    Apptainer image to use instead of `venv`. `options` are further options of sbatch."""

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
            f"launch.processes={self.processes} differs from launch.gpus_per_node={self.gpus_per_node}, and each "
            "process uses one GPU: set both to the same number, or 0 GPUs to train on CPUs",
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
                f"launch.time={self.time} is {limit} seconds, so launch.warning={self.warning} leaves no time to "
                "train: set a longer time or a shorter warning",
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
    """DeepSpeed's launcher. `hostfile` is a file with one line `HOST slots=N` for each node; without a hostfile only
    this host is used. `address` is the first node's address; if it is None, DeepSpeed runs `hostname -I` on the first
    node."""

    hostfile: str | None = field(default=None, metadata=PATH)
    address: str | None = None
    port: int = 29500

    def check(self) -> None:
        super().check()
        require(
            self.most == 1 or self.hostfile is not None,
            f"launch.nodes={self.nodes} needs a list of the nodes: set launch.hostfile=… to a file with one line "
            "`HOST slots=N` for each node",
        )


@dataclass
class Accelerate(Launch):
    """accelerate's launcher. `config` is accelerate's configuration file, `rank` is this node's index, and `address` is
    the address of node 0. `shutdown_timeout` is the number of seconds that the processes have to save a checkpoint
    after a signal."""

    config: str | None = field(default=None, metadata=PATH)
    shutdown_timeout: int = 600
    rank: int = 0
    address: str | None = None
    port: int = 29500

    def check(self) -> None:
        super().check()
        require(self.shutdown_timeout >= 1, f"launch.shutdown_timeout={self.shutdown_timeout} must be at least 1")
        require(
            self.config is not None,
            f"launch.config is not set: choose {', '.join(ACCELERATE)}, or a configuration file of accelerate",
        )
        require(0 <= self.rank < self.most, f"launch.rank={self.rank} must lie between 0 and {self.most - 1}")
        require(
            self.most == 1 or self.address is not None,
            f"launch.nodes={self.nodes} needs a rendezvous: set launch.address=… to the address of node 0",
        )


@dataclass
class Kubernetes(Elastic):
    """torchrun in a Kubernetes Job. `image` has this package. `claim` is the PersistentVolumeClaim that all pods share,
    and `mount` is its mount path and the run's working folder. `secret` names a Secret whose entries become environment
    variables. `grace` is the number of seconds between a pod's SIGTERM and SIGKILL. `backoff` is the maximum number of
    failed pods that the Job replaces. With `prepare`, the pods prepare the text of the run and do not train."""

    name: str | None = None
    prepare: bool = False
    namespace: str = "default"
    image: str | None = None
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
        require(self.mount.startswith("/"), f"launch.mount={self.mount} must be an absolute path, which starts with /")
        require(
            self.gpus in (0, self.processes),
            f"launch.processes={self.processes} differs from launch.gpus={self.gpus}, and each process uses one GPU: "
            "set both to the same number, or 0 GPUs to train on CPUs",
        )
        require(
            not self.prepare or (self.gpus, self.processes) == (0, 1),
            f"launch.prepare=true prepares text on CPUs, in data.workers processes of each pod: leave out launch.gpus="
            f"{self.gpus} and launch.processes={self.processes}",
        )
        require(self.cpus >= 1, f"launch.cpus={self.cpus} must be at least 1")
        bytes_of(self.memory, "launch.memory=")
        require(
            self.grace > self.shutdown_timeout,
            f"launch.grace={self.grace} kills a pod before launch.shutdown_timeout={self.shutdown_timeout} s "
            "have passed: set a longer launch.grace",
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
