"""Command lines of torchrun, DeepSpeed and accelerate, with the environment variables for them, gloo and NCCL."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from opt_parallel.config.paths import reach
from opt_parallel.launching.settings import ACCELERATE, TEMPLATES, Accelerate, DeepSpeed, Elastic, Launch, Torchrun
from opt_parallel.runtime.errors import UserError

# The signals that torchrun forwards by default, and SIGUSR1, which Slurm sends before the time limit.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PORT = 29500
# Launchers start `python -m opt_parallel train …` in each process. DeepSpeed has an option of another name for `-m`.
TRAIN = ["-m", "opt_parallel", "train"]


@dataclass(frozen=True)
class Command:
    """A program with its arguments (`argv`), the variables to add to its environment, and the other programs that it
    `needs`."""

    argv: list[str]
    environment: dict[str, str]
    needs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The command as one line for a shell."""
        return shlex.join([*assignments(self.environment), *self.argv])


def assignments(environment: dict[str, str]) -> list[str]:
    """The words `env NAME=value …` at the start of a command line, or nothing if there are no variables."""
    return ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []


def network(launch: Launch) -> dict[str, str]:
    """The variables that set the network interface of gloo and NCCL, or nothing if `launch.interface` is not set."""
    if launch.interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": launch.interface, "NCCL_SOCKET_IFNAME": launch.interface}


def torchrun_environment(launch: Elastic) -> dict[str, str]:
    """Environment variables of torchrun and its processes.

    By default, torchrun's agents and the training processes share one TCP store. After a restart this store still holds
    the addresses of dead processes, and the new processes would not find each other."""
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **network(launch)}


def threads(cpus: int | None, processes: int) -> dict[str, str]:
    """OMP_NUM_THREADS for each of `processes` that share `cpus` CPUs. torchrun's default is 1."""
    return {} if cpus is None else {"OMP_NUM_THREADS": str(max(1, cpus // processes))}


def torchrun_options(launch: Elastic, signals: str = SIGNALS) -> list[str]:
    """torchrun's options except the rendezvous endpoint and id. `signals` lists the signals that torchrun forwards to
    its processes."""
    timeout = launch.rendezvous_timeout
    return [
        "--nnodes", launch.nodes, "--nproc-per-node", str(launch.processes),
        "--max-restarts", str(launch.restarts), "--signals-to-handle", signals,
        "--shutdown-timeout", str(launch.shutdown_timeout),
        "--rdzv-backend", "c10d", "--rdzv-conf", f"join_timeout={timeout},read_timeout={timeout}",
    ]  # fmt: skip


def torchrun(launch: Torchrun, name: str, overrides: Sequence[str]) -> Command:
    """The torchrun command, which the user runs once on every node. `name` is the rendezvous id."""
    if launch.endpoint is None:
        rendezvous = ["--standalone"]
    else:
        endpoint = launch.endpoint if ":" in launch.endpoint else f"{launch.endpoint}:{PORT}"
        rendezvous = ["--rdzv-endpoint", endpoint, "--rdzv-id", name]
    by_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # torchrun would stop on SIGHUP despite nohup
    signals = SIGNALS.replace("SIGHUP,", "") if by_nohup else SIGNALS
    argv = ["torchrun", *torchrun_options(launch, signals), *rendezvous, *TRAIN, *overrides]
    return Command(argv, torchrun_environment(launch))


def deepspeed(launch: DeepSpeed, overrides: Sequence[str]) -> Command:
    """The command of DeepSpeed's launcher, which starts processes on the hosts of a hostfile by pdsh over ssh. Raises:
    UserError."""
    argv = ["deepspeed", "--no_local_rank", "--num_nodes", launch.nodes, "--num_gpus", str(launch.processes)]
    argv += ["--master_port", str(launch.port)]
    if launch.hostfile is None or launch.most == 1:
        return Command([*argv, "--module", *TRAIN[1:], *overrides], network(launch))
    if not reach("launch.hostfile=", launch.hostfile):
        raise UserError(f"launch.hostfile={launch.hostfile} does not exist: write a line `HOST slots=N` per node")
    argv += ["--hostfile", launch.hostfile, "--launcher", "pdsh"]
    argv += ["--master_addr", launch.address] if launch.address else []
    argv += ["--module", *TRAIN[1:], *map(through_pdsh, overrides)]
    return Command(argv, network(launch), needs=["pdsh", "ssh"])


def through_pdsh(argument: str) -> str:
    """An argument quoted for DeepSpeed's launcher, so that pdsh and the remote shell do not change the argument.

    pdsh replaces sequences that begin with %, and the remote shell parses the rest. DeepSpeed itself puts an argument
    with a space in double quotes, and escapes double quotes in it."""
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    for special in "\\$`":
        argument = argument.replace(special, f"\\{special}")
    return argument


def accelerate(launch: Accelerate, overrides: Sequence[str]) -> Command:
    """The `accelerate launch` command, which the user runs once on every node with the node's own `launch.rank`.
    Raises: UserError."""
    assert launch.config is not None
    path = TEMPLATES / "accelerate" / launch.config if launch.config in ACCELERATE else Path(launch.config)
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"launch.config={launch.config} cannot be read: choose {', '.join(ACCELERATE)}") from error
    argv = ["accelerate", "launch", "--config_file", str(path)]
    argv += ["--num_machines", launch.nodes, "--num_processes", str(launch.most * launch.processes)]
    argv += ["--machine_rank", str(launch.rank), "--main_process_port", str(launch.port)]
    argv += ["--main_process_ip", launch.address] if launch.address else []
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(launch.shutdown_timeout), **network(launch)}
    if isinstance(config, dict) and config.get("use_cpu"):  # accelerate ignores use_cpu with several processes
        environment["ACCELERATE_USE_CPU"] = "true"
    return Command([*argv, *TRAIN, *overrides], environment)
