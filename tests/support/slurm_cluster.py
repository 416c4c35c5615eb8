"""Starts a Slurm cluster of four nodes on this host, with Debian's munged, slurmctld and slurmd."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2", "node3", "node4")
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=300
JobRequeue=1
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName={nodes[2]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName={nodes[3]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[4]} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """The requirement of a Slurm cluster that is missing on this host, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster on this host needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)" if absent else None
    )


@dataclass
class Cluster:
    """A running Slurm cluster, with methods that query Slurm and that start and kill nodes."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which Slurm's programs find this cluster, without those of other launchers."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**ours, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __call__(self, *words: str, timeout: float = 60) -> str:
        """The output of one of Slurm's programs."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Simulate a power failure of a node. Its daemon and all processes of its jobs are killed.

        The daemons of job steps are killed first, because they would report the end of the job step."""
        self.daemons.pop(node).kill()
        while here := self.processes(f"SLURMD_NODENAME={node}"):
            holders = {parent for pid in here if read(f"/proc/{(parent := parent_of(pid))}/comm") == "slurmstepd\n"}
            for pid in [*holders, *here]:
                kill(pid)

    def processes(self, variable: str | None = None) -> list[int]:
        """The processes of this cluster's jobs and daemons, which are found by their initial environment variables."""
        wanted = {f"SLURM_CONF={self.folder / 'slurm.conf'}", *([variable] if variable else [])}
        return [pid for pid, variables in environments() if wanted <= variables]

    def field(self, job: str, name: str) -> str:
        """The value of the field `name` of a job in Slurm."""
        words = self("scontrol", "show", "job", job, "--oneliner").split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, *states: str, timeout: float = 900) -> str:
        """Wait until the job's state is one of `states`, and return it."""
        until(lambda: self.field(job, "JobState") in states, timeout, lambda: self("scontrol", "show", "job", job))
        return self.field(job, "JobState")


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A context with a Slurm cluster of four nodes with two CPUs, in the partitions `batch` and `urgent`.

    Jobs in `urgent` preempt those in `batch`. The cluster ends with the context."""
    for name in ("munge", "state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True, mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = CONF.format(folder=folder, ports=free_ports(5), nodes=NODES)
    (folder / "slurm.conf").write_text(conf)
    slurm = Cluster(folder)
    try:
        files = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        slurm.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *files)
        until((folder / "munge" / "socket").exists, 100, lambda: read(f"{folder}/munged.out"))
        slurm.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            slurm.start_node(node)
        until(lambda: idle(slurm) == len(NODES), 300, lambda: read(f"{folder}/slurmctld.log"))
        yield slurm
    finally:
        stop(slurm)


def idle(slurm: Cluster) -> int:
    """The number of idle nodes."""
    done = subprocess.run(
        ["sinfo", "--noheader", "--partition=batch", "--Node", "--states=idle", "--format=%N"],
        env=slurm.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return len(done.stdout.split())


def stop(slurm: Cluster) -> None:
    """Kill all processes of the cluster."""
    for daemon in slurm.daemons.values():
        daemon.terminate()
    for daemon in slurm.daemons.values():
        with ExitStack() as still:
            still.callback(daemon.wait)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
    while left := slurm.processes():
        for pid in left:
            kill(pid)


def environments() -> Iterator[tuple[int, set[str]]]:
    """The process id and the initial environment variables of every process on this host."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (text := read(f"{folder}/environ")):
            yield int(folder.name), set(text.split("\0"))


def read(path: str) -> str:
    """The text of a file, or an empty string if the file does not exist."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    """The id of a process's parent, or 0 if the process does not exist."""
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_ports(count: int) -> list[int]:
    """The numbers of ports that no program uses at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(holds: Callable[[], bool], timeout: float, describe: Callable[[], str]) -> None:
    """Wait until `holds()` is true, for at most `timeout` seconds. `describe()` is a text for the error message."""
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, f"not within {timeout} s: {describe()}"
        time.sleep(0.2)
