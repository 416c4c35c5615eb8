"""The command lines of torchrun, DeepSpeed and accelerate, and the environment that they, gloo and NCCL need."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from opt_parallel.config.paths import reach
from opt_parallel.launching.settings import Accelerate, DeepSpeed, Elastic, Launch, Torchrun
from opt_parallel.runtime.errors import UserError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's own, and what Slurm sends before a time limit
PORT = 29500


@dataclass(frozen=True)
class Command:
    """A program with its arguments, the variables that it is given besides those that are there, and other programs
    that must be there for it."""

    words: list[str]
    environment: dict[str, str]
    needs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line for a shell."""
        return shlex.join([*assignments(self.environment), *self.words])


def assignments(environment: dict[str, str]) -> list[str]:
    """`env NAME=value …`, the words in front of a command; none where there is nothing to set."""
    return ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []


def network(launch: Launch) -> dict[str, str]:
    """What gloo and NCCL need to know of the network, where they would choose wrongly."""
    if launch.interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": launch.interface, "NCCL_SOCKET_IFNAME": launch.interface}


def torchrun_environment(launch: Elastic) -> dict[str, str]:
    """Variables of torchrun and its processes.

    Its agents and the processes share one store unless told not to; after a restart that one still holds the addresses
    of processes that are gone, and they do not find each other."""
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **network(launch)}


def threads(cpus: int | None, processes: int) -> dict[str, str]:
    """The threads of each of `processes` on `cpus` CPUs; torchrun gives one where nobody says."""
    return {} if cpus is None else {"OMP_NUM_THREADS": str(max(1, cpus // processes))}


def torchrun_options(launch: Elastic, signals: str = SIGNALS) -> list[str]:
    """torchrun's options but for where its machines meet and under which name; `signals` are those it hands on."""
    patience = launch.rendezvous_timeout
    return [
        "--nnodes", launch.nodes, "--nproc-per-node", str(launch.processes),
        "--max-restarts", str(launch.restarts), "--signals-to-handle", signals,
        "--shutdown-timeout", str(launch.shutdown_timeout),
        "--rdzv-backend", "c10d", "--rdzv-conf", f"join_timeout={patience},read_timeout={patience}",
    ]  # fmt: skip


def torchrun(launch: Torchrun, name: str, script: Path, overrides: Sequence[str]) -> Command:
    """torchrun on this machine; on several, the same command on each. `name` is what they know the run by."""
    if launch.endpoint is None:
        place = ["--standalone"]
    else:
        endpoint = launch.endpoint if ":" in launch.endpoint else f"{launch.endpoint}:{PORT}"
        place = ["--rdzv-endpoint", endpoint, "--rdzv-id", name]
    kept_off = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup, which torchrun would undo
    signals = SIGNALS.replace("SIGHUP,", "") if kept_off else SIGNALS
    words = ["torchrun", *torchrun_options(launch, signals), *place, str(script), *overrides]
    return Command(words, torchrun_environment(launch))


def deepspeed(launch: DeepSpeed, script: Path, overrides: Sequence[str]) -> Command:
    """DeepSpeed's launcher, which reaches the machines of a hostfile by pdsh over ssh."""
    words = ["deepspeed", "--no_local_rank", "--num_nodes", launch.nodes, "--num_gpus", str(launch.processes)]
    words += ["--master_port", str(launch.port)]
    if launch.hostfile is None or launch.most == 1:
        return Command([*words, str(script), *overrides], network(launch))
    if not reach("launch.hostfile=", launch.hostfile):
        raise UserError(f"launch.hostfile={launch.hostfile} does not exist: write one `HOST slots=N` a line")
    words += ["--hostfile", launch.hostfile, "--launcher", "pdsh"]
    words += ["--master_addr", launch.address] if launch.address else []
    words += [str(script), *map(through_pdsh, overrides)]
    return Command(words, network(launch), needs=["pdsh", "ssh"])


def through_pdsh(word: str) -> str:
    """`word` as DeepSpeed must be given it, so that it comes out of pdsh and the far shell as it was.

    pdsh replaces what begins with %; the shell reads the rest. DeepSpeed itself puts a word with a space between double
    quotes, and a backslash before each that it holds."""
    word = word.replace("%", "%%")
    if " " not in word:
        return shlex.quote(word)
    for special in "\\$`":
        word = word.replace(special, f"\\{special}")
    return word


def accelerate(launch: Accelerate, script: Path, overrides: Sequence[str]) -> Command:
    """`accelerate launch` on this machine; on several, on each with its own rank."""
    assert launch.config is not None
    try:
        chosen = yaml.safe_load(Path(launch.config).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"launch.config={launch.config} cannot be read: choose a file of launch/accelerate/") from error
    words = ["accelerate", "launch", "--config_file", launch.config]
    words += ["--num_machines", launch.nodes, "--num_processes", str(launch.most * launch.processes)]
    words += ["--machine_rank", str(launch.rank), "--main_process_port", str(launch.port)]
    words += ["--main_process_ip", launch.address] if launch.address else []
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(launch.shutdown_timeout), **network(launch)}
    if isinstance(chosen, dict) and chosen.get("use_cpu"):  # accelerate's many-process launcher forgets it
        environment["ACCELERATE_USE_CPU"] = "true"
    return Command([*words, str(script), *overrides], environment)
