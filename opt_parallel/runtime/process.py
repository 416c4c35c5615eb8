"""This process's rank, world size and host, read from the launcher's environment variables. The functions of this
module need no process group."""

from __future__ import annotations

import os
import re
import socket

# Open MPI's names for rank, world size, local rank, local world size
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LAUNCHERS = (*RANK_VARIABLES, "MASTER_", "OMPI_", "SLURM_")  # Prefixes of launchers' variables.
SLURM_PORTS = 20_000, 10_000  # First port and number of ports; each Slurm job step uses one port of this range.
WATCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # Variables that torchrun, accelerate and DeepSpeed's launcher set.
PARENT = os.getppid()  # Parent process at the start; a process whose parent ends gets another parent.


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes of the run; 1 if RANK is not set, even if WORLD_SIZE is set."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def local_rank() -> int:
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """The number in an environment variable, or `default` if the variable holds no number. `Topology.open` reports a
    variable that holds no number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def is_main() -> bool:
    """Whether this process is rank 0."""
    return rank() == 0


def launcher_is_gone() -> bool:
    """Whether the launcher (torchrun, accelerate, DeepSpeed's) ended before this process, as after SIGKILL or a signal
    that the launcher does not forward. Without a launcher, the end of the parent process is ignored, because a shell
    may end on purpose after `opt-parallel train &`."""
    return os.getppid() != PARENT and any(name in os.environ for name in WATCHED)


def host() -> str:
    """This host's name. Under Slurm, the name is the node name that Slurm's commands and logs show."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def set_ranks() -> None:
    """If RANK is not set, set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from Open MPI's variables, or from
    Slurm's variables in a job step of several tasks. Empty variables are deleted first. torchrun, DeepSpeed and
    accelerate set RANK themselves."""
    for name in [name for name, value in os.environ.items() if name.startswith(LAUNCHERS) and not value]:
        del os.environ[name]
    if "RANK" in os.environ:
        return
    # Open MPI is tested before Slurm, because mpirun's processes in a Slurm job have Slurm's variables too.
    if (
        OPEN_MPI[0] in os.environ
    ):  # Open MPI is tested before Slurm, because mpirun's processes in a Slurm job have Slurm's variables too
        _set(*(os.environ[name] for name in OPEN_MPI))
        os.environ.setdefault("MASTER_PORT", "29500")  # the user gives the address by mpirun -x MASTER_ADDR=…
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _set(*_slurm_ranks())
        job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        first, number = SLURM_PORTS
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(first + (job * 16 + step) % number))


def _set(rank: str, world_size: str, local_rank: str, local_world_size: str) -> None:
    os.environ.update(zip(RANK_VARIABLES, (rank, world_size, local_rank, local_world_size), strict=True))


def _slurm_ranks() -> tuple[str, str, str, str]:
    tasks = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])[int(os.environ["SLURM_NODEID"])]
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, world_size, local_rank = (os.environ[name] for name in names)
    return rank, world_size, local_rank, str(tasks)


def tasks_per_node(text: str) -> list[int]:
    """Number of tasks on each node from Slurm's notation: `2(x3),1` means 2, 2, 2, 1."""
    numbers: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        numbers += [int(count)] * int(times or 1)
    return numbers


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list, such as gpu007 of `gpu[007-010,12],cpu1`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())
