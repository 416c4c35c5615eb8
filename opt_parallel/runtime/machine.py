"""The CPUs and the memory that this process may use within the limits of containers, batch systems and `ulimit`."""

from __future__ import annotations

import errno
import getpass
import os
import platform
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

PROC, CPUINFO = Path("/proc/self"), Path("/proc/cpuinfo")
# environment variables in which Slurm, PBS, TORQUE, Grid Engine and LSF give a job's number of CPUs
CPUS_GIVEN = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NCPUS", "PBS_NUM_PPN", "NSLOTS", "LSB_DJOB_NUMPROC")

OPEN_FILES = 65_536  # Enough for any run. Some programs try each possible descriptor, so a limit of millions is slow.


def cpus() -> int:
    """Number of CPUs that this process may use. The number is the minimum of the CPU affinity, the cgroups' quotas
    (rounded down) and the number of CPUs that the batch system allocated, but at least 1."""
    quotas = [int(quota) for quota in _quotas()]
    return max(1, min([_affinity(), *quotas, *_given()]))


def cpu_model() -> str:
    """The model of this host's CPU, or its architecture, such as aarch64, if the system does not state the model."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    line = re.search(r"^model name\s*:(.+)$", text, re.MULTILINE)
    return line[1].strip() if line else platform.machine()


def resident_peak() -> int:
    """The largest number of bytes of this process in memory. On Linux `ru_maxrss` would start at that of the parent
    process."""
    try:
        status = (PROC / "status").read_text(encoding="utf-8")
    except OSError:  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def limit_threads() -> None:
    """Limit the threads of libraries to `cpus()`, because libraries consider the CPU affinity only. Libraries read
    these environment variables when they are imported."""
    number = cpus()
    if number < _affinity():
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ.setdefault(name, str(number))


def raise_open_files() -> int:
    """Raise this process's limit of open files (`ulimit -n`) as far as the system allows, up to `OPEN_FILES`, because
    each connection to another rank is an open file. Returns the limit."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        return wanted
    return OPEN_FILES if limit == resource.RLIM_INFINITY else limit


def ensure_home() -> str | None:
    """Set the variables USER and HOME if the user id has no account, as in some containers. Some libraries fail without
    USER and HOME.

    Returns the temporary home folder, or None if the user has a home folder."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 and later raise OSError
        os.environ["USER"] = f"user-{os.getuid()}"
    if os.path.expanduser("~") != "~":
        return None
    folder = Path(tempfile.gettempdir()) / f"home-of-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["HOME"] = str(folder if folder.stat().st_uid == os.getuid() else tempfile.mkdtemp())
    return os.environ["HOME"]


def memory_limit() -> int:
    """Maximum number of bytes of memory that this process can allocate, which is the minimum of the host's memory and
    of the limits of its cgroups, of `ulimit -v` and `-d`, and of the Slurm job."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in (*_shared_memory(), *_own_memory()))])


def memory_free(processes: int = 1) -> int:
    """Number of bytes that each of `processes` equal processes can still allocate on this host within the limits of
    `memory_limit`. The page cache counts as free memory."""
    import psutil

    shared = [psutil.virtual_memory().available, *(limit - used for limit, used in _shared_memory())]
    return max(0, min([min(shared) // processes, *(limit - used for limit, used in _own_memory())]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out. Python and NumPy raise MemoryError, torch raises OutOfMemoryError on
    a GPU, and a failed allocation or mmap raises an error with the text of ENOMEM."""
    gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or gpu or os.strerror(errno.ENOMEM) in str(error)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _given() -> list[int]:
    values = [os.environ.get(name, "") for name in CPUS_GIVEN]
    return [int(value) for value in values if value.isdecimal() and int(value) > 0]


def _quotas() -> Iterator[float]:
    """Number of CPUs in the quota of each of this process's cgroups, which is quota / period."""
    for folder in _groups("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2
        quota = quota or _text(folder / "cpu.cfs_quota_us")
        period = period or _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():  # `max` or -1 means no quota
            yield int(quota) / int(period)


def _shared_memory() -> Iterator[tuple[int, int]]:
    """Each memory limit that all processes of a job on this host share, with the memory in use, in bytes."""
    yield from _group_memory()
    given, by_cpu, cpus_here = (
        os.environ.get(f"SLURM_{name}", "") for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")
    )
    mebibytes = int(given or 0) or int(by_cpu or 0) * int(cpus_here or 0)  # 0 means all of the host's memory
    if mebibytes:
        yield mebibytes << 20, _status().get("VmRSS", 0)


def _group_memory() -> Iterator[tuple[int, int]]:
    """Memory limit and memory in use, in bytes, of each of this process's cgroups that has a limit. `memory.high`
    (version 2) counts as a limit, because the kernel slows processes above `memory.high` almost to a halt."""
    for folder in _groups("memory"):
        limits = [_text(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        for limit in limits:
            if limit.isdecimal() and used:
                yield int(limit), int(used) - _page_cache(folder)


def _page_cache(folder: Path) -> int:
    """Bytes of page cache in a cgroup's memory use. The kernel reclaims the page cache on demand."""
    rows = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    names = ("active_file", "inactive_file")  # these count this cgroup alone; total_… includes child groups
    return sum(int(rows.get(f"total_{name}", rows.get(name, 0))) for name in names)


def _own_memory() -> Iterator[tuple[int, int]]:
    """Limit and current size, in bytes, of this process's address space and data segment, if they are limited."""
    import resource

    status = _status()
    for number, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY and name in status:
            yield limit, status[name]


def _status() -> dict[str, int]:
    """Sizes in bytes from /proc/self/status, by name."""
    return {name: int(size) * 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", _text(PROC / "status"))}


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroups (version 1 or 2), from the innermost to the outermost group."""
    # The dictionary maps cgroup controllers to paths.
    own = dict(line.split(":", 2)[1:] for line in _text(PROC / "cgroup").splitlines())
    paths = {name: path for names, path in own.items() for name in names.split(",")}
    for line in _text(PROC / "mountinfo").splitlines():
        fields, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        root, mounted = (_unescaped(field) for field in fields.split(" ")[3:5])
        path = Path(paths.get(controller if kind == "cgroup" else "", "/"))
        # In a container the mount shows only the container's group, but the path may be relative to the host's root
        # group.
        inside = path.relative_to(root) if path.is_relative_to(root) and ".." not in path.parts else Path()
        yield from (Path(mounted) / part for part in (inside, *inside.parents))


def _unescaped(field: str) -> str:
    """A path from `mountinfo` with its octal escapes decoded, such as \\040 for a space."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)


def _text(path: Path) -> str:
    """The content of a kernel file, or an empty text if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
