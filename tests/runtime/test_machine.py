"""What a process may use: real control groups and `ulimit` where this machine lets us make them, and folders written as
the kernel writes them, for the version of control groups that it does not have."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import ROOT, environment

from opt_parallel.runtime import machine

MB = 1 << 20
NONE = 9223372036854771712  # version 1's way to say that there is no limit


@pytest.fixture(autouse=True)
def no_batch_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SLURM_") or name in machine.CPUS_GIVEN:
            monkeypatch.delenv(name)


Make = Callable[..., None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`groups(cgroup, mounts, files)` writes what the kernel would show: /proc/self/cgroup, the mounts as (fields 4 and
    5, type, options), the groups' files."""

    def make(cgroup: str, mounts: list[tuple[str, str, str, str]], files: dict[str, str]) -> None:
        lines = [f"30 24 0:26 {root} {tmp_path}/{at} rw - {kind} none {options}" for root, at, kind, options in mounts]
        (tmp_path / "cgroup").write_text(cgroup)
        (tmp_path / "mountinfo").write_text("20 1 8:1 / / rw shared:1 - ext4 /dev/sda rw\n" + "\n".join(lines) + "\n")
        (tmp_path / "status").write_text("Name:\tpython\nVmSize:\t  409600 kB\nVmRSS:\t  102400 kB\nThreads:\t4\n")
        for name, text in files.items():
            path = tmp_path / name.replace("\\040", " ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        monkeypatch.setattr(machine, "PROC", tmp_path)

    return make


V2 = [("/", "fs", "cgroup2", "rw,nsdelegate")]
V1 = [("/", "fs/cpu", "cgroup", "rw,cpu,cpuacct"), ("/", "fs/memory", "cgroup", "rw,memory")]


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("processor\t: 0\nmodel\t\t: 1\nmodel name\t: A CPU (R) @ 2 GHz\nmodel name\t: another\n", "A CPU (R) @ 2 GHz"),
        ("CPU implementer\t: 0x41\n", platform.machine()),  # ARM states no name
    ],
)
def test_the_model_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, model: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_model() == model
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "missing")
    assert machine.cpu_model()


@pytest.mark.parametrize(
    ("quotas", "number"),
    [
        ({"fs/a/b/cpu.max": "50000 100000"}, 1),
        ({"fs/a/b/cpu.max": "max 100000", "fs/a/cpu.max": "300000 100000"}, 3),  # of the group around
        ({"fs/a/b/cpu.max": "350000 100000", "fs/a/cpu.max": "max 100000"}, 3),
        ({"fs/a/b/cpu.max": "20000 10000", "fs/a/cpu.max": "500000 100000"}, 2),
        ({"fs/a/b/cpu.max": "max 100000"}, 96),
        ({}, 96),
    ],
)
def test_the_quota_of_version_2(
    groups: Make, monkeypatch: pytest.MonkeyPatch, quotas: dict[str, str], number: int
) -> None:
    groups("0::/a/b\n", V2, quotas)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    assert machine.cpus() == number


@pytest.mark.parametrize(
    ("cgroup", "mounts", "folder"),
    [
        ("4:cpu,cpuacct:/a/b\n3:memory:/\n", V1, "fs/cpu/a"),
        # a container: the mount shows its own group, and the path is the host's or begins anew
        ("4:cpu,cpuacct:/docker/f3\n", [("/docker/f3", "fs/cpu", "cgroup", "rw,cpu,cpuacct")], "fs/cpu"),
        ("4:cpu,cpuacct:/\n", [("/docker/f3", "fs/cpu", "cgroup", "rw,cpu,cpuacct")], "fs/cpu"),
        ("4:cpu:/../pod\n", [("/", "fs/cpu", "cgroup", "rw,cpu")], "fs/cpu"),
        ("4:cpu:/a:b\n0::/x\n", [*V2, ("/", "my\\040fs", "cgroup", "rw,cpu")], "my fs/a:b"),  # both versions
    ],
)
def test_the_quota_of_version_1_wherever_it_is_mounted(
    groups: Make, monkeypatch: pytest.MonkeyPatch, cgroup: str, mounts: list[tuple[str, str, str, str]], folder: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    groups(cgroup, mounts, {f"{folder}/cpu.cfs_quota_us": "250000", f"{folder}/cpu.cfs_period_us": "100000"})
    assert machine.cpus() == 2
    groups(cgroup, mounts, {f"{folder}/cpu.cfs_quota_us": "50000"})  # half a CPU
    assert machine.cpus() == 1
    groups(cgroup, mounts, {f"{folder}/cpu.cfs_quota_us": "-1"})
    assert machine.cpus() == 96


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("SLURM_CPUS_PER_TASK", "3", 3), ("SLURM_CPUS_ON_NODE", "8", 8), ("NCPUS", "5", 5), ("PBS_NUM_PPN", "4", 4),
        ("NSLOTS", "7", 7), ("LSB_DJOB_NUMPROC", "2", 2), ("SLURM_CPUS_PER_TASK", "", 96), ("NCPUS", "200", 96),
    ],
)  # fmt: skip
def test_what_a_batch_system_gave(
    groups: Make, monkeypatch: pytest.MonkeyPatch, name: str, value: str, number: int
) -> None:
    groups("0::/\n", V2, {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setenv(name, value)
    assert machine.cpus() == number


@pytest.mark.parametrize(
    ("affinity", "quota", "given", "number"), [(2, 3, "4", 2), (4, 2, "3", 2), (4, 3, "2", 2), (1, 8, "8", 1)]
)
def test_the_least_of_affinity_quota_and_batch_system(
    groups: Make, monkeypatch: pytest.MonkeyPatch, affinity: int, quota: int, given: str, number: int
) -> None:
    groups("0::/a\n", V2, {"fs/a/cpu.max": f"{quota}00000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
    assert machine.cpus() == number


THREADS = """
from opt_parallel.runtime.log import quiet_libraries
from opt_parallel.runtime.machine import cpus
quiet_libraries()
import torch
print(cpus(), torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("affinity", "given", "threads"),
    [
        pytest.param(1, {}, 1, marks=pytest.mark.long),
        # without a cgroup, as Slurm's default is
        pytest.param(None, {"SLURM_CPUS_PER_TASK": "1"}, 1, marks=pytest.mark.long),
        pytest.param(None, {"OMP_NUM_THREADS": "1"}, 1, marks=pytest.mark.long),  # torchrun's word, or the user's
        pytest.param(None, {"SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "2"}, 2, marks=pytest.mark.long),
    ],
)
def test_threads_of_a_real_process(affinity: int | None, given: dict[str, str], threads: int) -> None:
    variables = environment()
    del variables["OMP_NUM_THREADS"]
    allowed = os.sched_getaffinity(0)
    kept = allowed if affinity is None else set(sorted(allowed)[:affinity])
    done = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, env=variables | given, capture_output=True, text=True, timeout=60,
        check=True, preexec_fn=lambda: os.sched_setaffinity(0, kept),
    )  # fmt: skip
    number = min(len(kept), int(given.get("SLURM_CPUS_PER_TASK", "1000000")))
    assert list(map(int, done.stdout.split())) == [number, min(threads, len(kept))]


def test_threads_are_limited_where_libraries_would_not_know(groups: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    groups("0::/a\n", V2, {"fs/a/cpu.max": "200000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # the user's word stays
    machine.limit_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["RAYON_NUM_THREADS"]) == ("2", "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    machine.limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "limit", "free"),
    [
        ("0::/a/b\n", V2, {"fs/a/b/memory.max": "max", "fs/a/b/memory.current": f"{5 * MB}"}, None, None),
        # pages of files count as free; the group around decides
        (
            "0::/a/b\n",
            V2,
            {
                "fs/a/b/memory.max": "max", "fs/a/b/memory.current": f"{40 * MB}",
                "fs/a/memory.max": f"{100 * MB}", "fs/a/memory.current": f"{60 * MB}",
                "fs/a/memory.stat": f"anon {30 * MB}\ninactive_file {20 * MB}\nactive_file {5 * MB}",
            },
            100, 65,
        ),
        ("0::/a\n", V2, {"fs/a/memory.max": f"{100 * MB}", "fs/a/memory.high": f"{80 * MB}",
                         "fs/a/memory.current": f"{50 * MB}"}, 80, 30),
        ("0::/a\n", V2, {"fs/a/memory.max": f"{100 * MB}", "fs/a/memory.current": f"{101 * MB}"}, 100, 0),
        (
            "3:memory:/a/b\n",
            V1,
            {
                "fs/memory/a/b/memory.limit_in_bytes": f"{NONE}", "fs/memory/a/b/memory.usage_in_bytes": "0",
                "fs/memory/a/memory.limit_in_bytes": f"{90 * MB}", "fs/memory/a/memory.usage_in_bytes": f"{70 * MB}",
                "fs/memory/a/memory.stat": f"inactive_file 0\ntotal_inactive_file {10 * MB}\ntotal_active_file 0",
            },
            90, 30,
        ),
    ],
)  # fmt: skip
def test_memory_of_control_groups(
    groups: Make, cgroup: str, mounts: list, files: dict[str, str], limit: int | None, free: int | None
) -> None:
    import psutil

    groups(cgroup, mounts, files)
    if limit is None:
        assert machine.memory_limit() == psutil.virtual_memory().total
        assert machine.memory_free() > 10 * MB
    else:
        assert free is not None
        assert (machine.memory_limit(), machine.memory_free()) == (limit * MB, free * MB)


@pytest.mark.parametrize(
    "given", [{"SLURM_MEM_PER_NODE": "400"}, {"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}]
)
def test_memory_that_slurm_gave(groups: Make, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    groups("0::/\n", V2, {})
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert (machine.memory_limit(), machine.memory_free()) == (400 * MB, 300 * MB)  # 100 MB are in use


@pytest.mark.parametrize("letter", ["v", "d"])
def test_ulimit(letter: str) -> None:
    program = "from opt_parallel.runtime.machine import *; print(memory_limit(), memory_free())"
    line = f"ulimit -{letter} 2000000; exec {sys.executable} -c '{program}'"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    limit, free = map(int, done.stdout.split())
    assert limit == 2_000_000 * 1024
    assert limit - 500 * MB < free < limit


@pytest.fixture
def real_group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group of this machine's, inside the one that we are in; where it lets us make one."""
    for outer in machine._groups(request.param):
        folder = outer / f"opt-parallel-test-{os.getpid()}"
        controllers = outer / "cgroup.subtree_control"
        if controllers.exists() and request.param not in controllers.read_text().split():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip(f"no control group with {request.param} can be made here")


def said_in(group: Path, before: str, program: str) -> list[int]:
    line = f"echo $$ > {group}/cgroup.procs; {before}; exec {sys.executable} -c '{program}'"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize("real_group", ["cpu"], indirect=True)
def test_half_a_cpu_by_quota_is_one(real_group: Path) -> None:
    version_2 = real_group / "cpu.max"
    if version_2.exists():
        version_2.write_text("50000 100000")
    else:
        (real_group / "cpu.cfs_quota_us").write_text("50000")
    program = THREADS.replace("import torch", "import os").replace(
        "torch.get_num_threads()", 'os.environ["OMP_NUM_THREADS"]'
    )
    assert said_in(real_group, "unset OMP_NUM_THREADS", program) == [1, 1]  # torch obeys the variable, as above


@pytest.mark.parametrize("real_group", ["memory"], indirect=True)
def test_a_real_limit_of_memory(real_group: Path) -> None:
    version_2 = real_group / "memory.max"
    (version_2 if version_2.exists() else real_group / "memory.limit_in_bytes").write_text(str(400 * MB))
    program = (
        "from opt_parallel.runtime.machine import *; print(memory_limit(), memory_free()); "
        "held = bytearray(200 << 20); print(memory_free())"
    )
    limit, before, after = said_in(real_group, ":", program)
    assert limit == 400 * MB
    assert 300 * MB < before < 400 * MB
    assert before - after == pytest.approx(200 * MB, abs=5 * MB)
