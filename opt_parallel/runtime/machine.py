"""The CPUs and the memory that this process may use: containers, batch systems and `ulimit` give it less than the
machine has."""

from __future__ import annotations

import errno
import getpass
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
# CPUs of this process or of its job, as Slurm, PBS, TORQUE, Grid Engine and LSF tell their jobs
CPUS_GIVEN = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NCPUS", "PBS_NUM_PPN", "NSLOTS", "LSB_DJOB_NUMPROC")


def cpus() -> int:
    """CPUs that this process may use: the least of its affinity, its control groups' quotas (a part of a CPU does not
    count, but for the first) and what a batch system gave it."""
    quotas = [int(quota) for quota in _quotas()]
    return max(1, min([_affinity(), *quotas, *_given()]))


def limit_threads() -> None:
    """Have libraries start no more threads than there are CPUs. They know the affinity alone, and read this when they
    are imported."""
    number = cpus()
    if number < _affinity():
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ.setdefault(name, str(number))


def stand_in_for_account() -> str | None:
    """Set USER and HOME where the system knows neither, as of a container's number that has no account: libraries fail
    without them. The home folder then made, in the system's temporary one, or None."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        os.environ["USER"] = f"user-{os.getuid()}"
    if os.path.expanduser("~") != "~":
        return None
    folder = Path(tempfile.gettempdir()) / f"home-of-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["HOME"] = str(folder if folder.stat().st_uid == os.getuid() else tempfile.mkdtemp())
    return os.environ["HOME"]


def memory_limit() -> int:
    """Bytes of memory that this process can have at most: the least of the machine's, its control groups' limits, its
    own (`ulimit -v`, `-d`) and what Slurm gave its job."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in (*_shared_memory(), *_own_memory()))])


def memory_free(processes: int = 1) -> int:
    """Bytes that each of so many `processes` alike can still take on this host, by the same limits. Pages of files that
    are only kept in case they are read again count as free."""
    import psutil

    shared = [psutil.virtual_memory().available, *(limit - used for limit, used in _shared_memory())]
    return max(0, min([min(shared) // processes, *(limit - used for limit, used in _own_memory())]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's and NumPy's, torch's of a GPU, or one that repeats what the
    system said, of an allocation or of a file that was to be mapped."""
    gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or gpu or os.strerror(errno.ENOMEM) in str(error)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _given() -> list[int]:
    values = [os.environ.get(name, "") for name in CPUS_GIVEN]
    return [int(value) for value in values if value.isdecimal() and int(value) > 0]


def _quotas() -> Iterator[float]:
    """CPUs by the quotas of this process's groups: microseconds of CPU a period."""
    for folder in _groups("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2
        quota = quota or _text(folder / "cpu.cfs_quota_us")
        period = period or _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():  # without a quota: max, -1
            yield int(quota) / int(period)


def _shared_memory() -> Iterator[tuple[int, int]]:
    """Each limit in bytes that holds for all of a job's processes on this host, and how much of it is used."""
    yield from _group_memory()
    given, by_cpu, cpus_here = (
        os.environ.get(f"SLURM_{name}", "") for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    mebibytes = int(given or 0) or int(by_cpu or 0) * int(cpus_here or 0)  # 0: all that the host has
    if mebibytes:
        yield mebibytes << 20, _status().get("VmRSS", 0)


def _group_memory() -> Iterator[tuple[int, int]]:
    """Limit and use of each of this process's groups that has a limit, in bytes. Version 2's `high` is one, too: above
    it a group comes nearly to a halt."""
    for folder in _groups("memory"):
        limits = [_text(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        for limit in limits:
            if limit.isdecimal() and used:
                yield int(limit), int(used) - _kept_in_case(folder)


def _kept_in_case(folder: Path) -> int:
    """Bytes of a group's use that are pages of files, which the kernel takes back when it needs them."""
    rows = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    names = ("active_file", "inactive_file")  # of this group; with total_, those below it as well, where both exist
    return sum(int(rows.get(f"total_{name}", rows.get(name, 0))) for name in names)


def _own_memory() -> Iterator[tuple[int, int]]:
    """Limit and use of this process's own limits: of address space, and of data."""
    import resource

    status = _status()
    for number, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY and name in status:
            yield limit, status[name]


def _status() -> dict[str, int]:
    """Sizes of this process, in bytes, by the kernel's names for them."""
    return {name: int(size) * 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", _text(PROC / "status"))}


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, of either version, from its own to the outermost."""
    own = dict(line.split(":", 2)[1:] for line in _text(PROC / "cgroup").splitlines())  # by controllers; "": version 2
    paths = {name: path for names, path in own.items() for name in names.split(",")}
    for line in _text(PROC / "mountinfo").splitlines():
        fields, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        root, mounted = (_unescaped(field) for field in fields.split(" ")[3:5])
        path = Path(paths.get(controller if kind == "cgroup" else "", "/"))
        # in a container the mount shows the container's group, and the path may be the host's
        inside = path.relative_to(root) if path.is_relative_to(root) and ".." not in path.parts else Path()
        yield from (Path(mounted) / part for part in (inside, *inside.parents))


def _unescaped(field: str) -> str:
    """A path as `mountinfo` writes it: a space is \\040."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


def _text(path: Path) -> str:
    """What stands in a file of the kernel's; nothing where it has none such."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
