"""How a run is started, typed: one section for each system of `configs/launch/`. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from opt_parallel.config.model import Section, require
from opt_parallel.config.paths import PATH
from opt_parallel.config.units import bytes_of
from opt_parallel.runtime.errors import UserError

UNITS_OF_TIME = {  # Slurm's ways to write a time, as its manual lists them
    r"(?P<m>\d+)(:(?P<s>\d+))?": "minutes or minutes:seconds",
    r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)": "hours:minutes:seconds",
    r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+))?(:(?P<s>\d+))?": "days-hours, days-hours:minutes, …",
}
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
DNS_LABEL = r"[a-z]([-a-z0-9]{0,55}[a-z0-9])?"  # RFC 1035, as Services are named; a pod adds -0, -1, …


class System(Enum):
    torchrun = "torchrun"
    slurm = "slurm"
    deepspeed = "deepspeed"
    accelerate = "accelerate"
    kubernetes = "kubernetes"


@dataclass
class Launch(Section):
    """What every system is told. `nodes`: machines, of torchrun also `fewest:most`; `processes`: of each machine;
    `interface`: the network interface that gloo and NCCL talk over, None: theirs to find; `dry_run`: print what would
    be started."""

    system: System = System.torchrun
    nodes: str = "1"
    processes: int = 1
    interface: str | None = None
    dry_run: bool = False

    def check(self) -> None:
        require(
            re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.nodes) is not None and self.fewest <= self.most,
            f"launch.nodes={self.nodes} is no number of machines: write 2, or with torchrun 1:2 for one or two",
        )
        require(
            self.fewest == self.most or self.system is System.torchrun,
            f"launch.nodes={self.nodes}: {self.system.value} starts as many as it is told, write one number; "
            "launch=torchrun goes on with fewer",
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
    """What torchrun is told wherever it runs. `shutdown_timeout`: seconds that the processes have to save after a
    signal; `restarts`: how often a machine starts its processes again, each time from the last whole checkpoint;
    `rendezvous_timeout`: seconds that machines wait for one another, to begin and through an outage of the network."""

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
    """`endpoint`: `HOST[:PORT]` where machines meet, one of them."""

    endpoint: str | None = None

    def check(self) -> None:
        super().check()
        require(
            self.nodes == "1" or self.endpoint is not None,
            f"launch.nodes={self.nodes} machines must know where to meet: set launch.endpoint=HOST:29500, one of them",
        )
        require(
            self.endpoint is None or re.fullmatch(r"[^:\s]+(:\d+)?", self.endpoint) is not None,
            f"launch.endpoint={self.endpoint} is no place to meet: write HOST or HOST:29500",
        )


@dataclass
class Slurm(Elastic):
    """`warning`: seconds before the time limit at which the run is told to save and end. `venv`: the environment with
    this package, None: the one that submits; `container`: an image that Apptainer runs instead. `options`: further
    options of sbatch."""

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
            f"launch.processes={self.processes} on launch.gpus_per_node={self.gpus_per_node} GPUs: a process takes one "
            "GPU, so give both the same number, or 0 GPUs to train on CPUs",
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
            f"launch.venv={self.venv} and launch.container={self.container} are two homes of Python: set one to null",
        )
        for option in self.options:
            require(
                re.fullmatch(r"--[a-z][-a-z]*(=[^\n]+)?", option) is not None,
                f"launch.options={self.options}: {option!r} is no option of sbatch: write --name or --name=value",
            )


@dataclass
class DeepSpeed(Launch):
    """`hostfile`: `HOST slots=N` a line; None: this machine alone. `address`: of the first machine, None: DeepSpeed
    asks it."""

    hostfile: str | None = field(default=None, metadata=PATH)
    address: str | None = None
    port: int = 29500

    def check(self) -> None:
        super().check()
        require(
            self.most == 1 or self.hostfile is not None,
            f"launch.nodes={self.nodes} machines: name them in a file, launch.hostfile=…, one `HOST slots=N` a line",
        )


@dataclass
class Accelerate(Launch):
    """`config`: a file of accelerate's own; `rank`: this machine's number; `address`: of machine 0;
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
            f"launch.nodes={self.nodes} machines must know where to meet: set launch.address=… to machine 0's",
        )


@dataclass
class Kubernetes(Elastic):
    """`code`: where the image has this repository. `claim`, `mount`: a volume that all pods share, and where it is
    mounted; the run begins there. `secret`: the name of a Secret whose entries become environment variables.
    `grace`: seconds between a pod's SIGTERM and its end; `backoff`: failed pods that the Job replaces."""

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
            require(getattr(self, key) is not None, f"launch.{key} is not set: write launch.{key}={example}, for one")
        for key in ("name", "namespace"):
            value = getattr(self, key)
            require(
                re.fullmatch(DNS_LABEL, value) is not None,
                f"launch.{key}={value} is no name in Kubernetes: small letters, digits and -, at most 57",
            )
        for key in ("code", "mount"):
            value = getattr(self, key)
            require(value.startswith("/"), f"launch.{key}={value} must be a whole path, from /")
        require(
            self.gpus in (0, self.processes),
            f"launch.processes={self.processes} on launch.gpus={self.gpus} GPUs: a process takes one GPU, so give both "
            "the same number, or 0 GPUs to train on CPUs",
        )
        require(self.cpus >= 1, f"launch.cpus={self.cpus} must be at least 1")
        bytes_of(self.memory, "launch.memory=")
        require(
            self.grace > self.shutdown_timeout,
            f"launch.grace={self.grace} ends a pod before launch.shutdown_timeout={self.shutdown_timeout} has let it "
            "save: give it more",
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
    """Seconds of a time limit as Slurm writes it. Raises: `UserError`."""
    for pattern in UNITS_OF_TIME:
        if match := re.fullmatch(pattern, time):
            return sum(SECONDS[unit] * int(number) for unit, number in match.groupdict().items() if number)
    raise UserError(f"launch.time={time} is no time limit: write {'; '.join(UNITS_OF_TIME.values())}")
