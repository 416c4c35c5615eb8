"""Which process of which run this is, by what its launcher put into the environment: known before any group exists."""

from __future__ import annotations

import os
import re
import socket

# rank, world size, rank on this host, processes on this host, as the launchers that set no RANK call them
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LAUNCHERS = (*PLACE, "MASTER_", "OMPI_", "SLURM_")  # how the names of their variables begin
SLURM_PORTS = 20_000, 10_000  # a job's own out of this many from here
WATCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # set by torchrun, and accelerate with it; by DeepSpeed's launcher
PARENT = os.getppid()  # at the start: a process whose parent ends is given another one


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    """1 without a RANK, as of a process that stands alone where WORLD_SIZE is set for others."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def local_rank() -> int:
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """A variable's; one that is no number is refused when the ranks join."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def is_main() -> bool:
    """Whether this process is rank 0."""
    return rank() == 0


def launcher_is_gone() -> bool:
    """Whether torchrun, or another launcher that outlives its ranks, ended before this process did: by SIGKILL, or a
    signal that it does not hand on. Who started Python by hand may end on purpose, as a shell does after `&`."""
    return os.getppid() != PARENT and any(name in os.environ for name in WATCHED)


def host() -> str:
    """This host's name; Slurm's for it where it started us, as its commands and logs say it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def take_place() -> None:
    """Where the launcher set no RANK, as torchrun, DeepSpeed's and accelerate's do, take it from Open MPI's variables
    or Slurm's (of a step of several tasks). A variable that is set to nothing is as good as none."""
    for name in [name for name, value in os.environ.items() if name.startswith(LAUNCHERS) and not value]:
        del os.environ[name]
    if "RANK" in os.environ:
        return
    if OPEN_MPI[0] in os.environ:  # before Slurm's: mpirun within a job starts its daemons by srun
        _set(*(os.environ[name] for name in OPEN_MPI))
        os.environ.setdefault("MASTER_PORT", "29500")  # it tells no address: mpirun -x MASTER_ADDR=…
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _set(*_slurm_place())
        job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        first, number = SLURM_PORTS
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(first + (job * 16 + step) % number))


def _set(rank: str, world_size: str, local_rank: str, local_world_size: str) -> None:
    os.environ.update(zip(PLACE, (rank, world_size, local_rank, local_world_size), strict=True))


def _slurm_place() -> tuple[str, str, str, str]:
    tasks = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])[int(os.environ["SLURM_NODEID"])]
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, world_size, local_rank = (os.environ[name] for name in names)
    return rank, world_size, local_rank, str(tasks)


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` as Slurm abbreviates it: 2, 2, 2, 1."""
    numbers: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        numbers += [int(count)] * int(times or 1)
    return numbers


def first_host(nodes: str) -> str:
    """The first of a list such as `gpu[007-010,12],cpu1`: gpu007."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())
