"""Runs over two hosts, with real processes on a real network that fails: `make test-nodes`.

opt-tiny with tensor 2 within each host and data 2 across, on whatever launcher, is the run of one host; and after an
outage, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import python, small, torchrun, train_rows
from hosts import Host, two_hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STEPS, STRIKE_AT = 60, 10  # rows in metrics.jsonl when the outage begins
EVERY = 4  # steps from one checkpoint to the next
TIMEOUT = 400.0  # seconds until whatever is awaited counts as hanging
LAYOUT = ["parallel.tensor=2", "parallel.timeout=10", "model.attention_dropout=0"]
LENGTH = [f"steps={STEPS}", f"checkpoint.every={EVERY}"]
TORCHRUN = ["launch=torchrun", "launch.nodes=2", "launch.processes=2", "launch.endpoint=nodeA"]
GONE = "another rank is gone"

Losses = list[tuple[int, float]]


class Nodes:
    """A run on two hosts, each of which starts its part; what a host prints is kept, however often it starts."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.run = folder / "run"
        self.arguments = [*small(folder), *LAYOUT, *LENGTH]
        self.launchers: dict[Host, subprocess.Popen[bytes]] = {}

    def start(self, host: Host, *launch: str, **env: str) -> None:
        self.start_command(host, [sys.executable, "launch/submit.py", *launch, *self.arguments], **env)

    def start_command(self, host: Host, command: list[str], **env: str) -> None:
        self.launchers[host] = host.start(command, self._output(host), **env)

    def said(self, host: Host) -> str:
        """All that the host printed."""
        return self._output(host).read_text()

    def steps_made(self) -> int:
        return len(train_rows(self.run)) if (self.run / "metrics.jsonl").exists() else 0

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain until {what}:\n{self._all_said()}"
            time.sleep(0.1)

    def train_until_struck(self) -> None:
        """Until the run is well under way."""
        self.wait_until(lambda: self.steps_made() >= STRIKE_AT or self._any_ended(), f"step {STRIKE_AT}")
        assert not self._any_ended(), self._all_said()

    def wait_for_end(self, *hosts: Host) -> list[int]:
        """The statuses of the hosts' launchers, once they have ended."""
        self.wait_until(lambda: all(self.launchers[host].poll() is not None for host in hosts), "the launchers end")
        return [self.launchers[host].wait() for host in hosts]

    def check_continued(self, data: int) -> None:
        """The run must have gone on from the newest checkpoint before the outage, with so many data ranks, and have
        left whole checkpoints alone."""
        said = self.said(self.hosts[0])
        starts = [line for line in said.splitlines() if line.startswith(("starting: ", "continuing at step "))]
        assert len(starts) == 2, self._all_said()
        step = int(starts[1].split()[3].rstrip(":"))
        assert STRIKE_AT - EVERY <= step < STEPS, starts
        assert step % EVERY == 0, starts
        assert f"data({data}) × tensor(2)" in starts[1]
        assert "finished: opt-tiny" in said
        assert "damaged" not in said
        assert (self.run / "state").read_text() == "done\n"
        left = sorted(path.name for path in (self.run / "checkpoints").iterdir())
        assert left == [f"step-{STEPS - EVERY}", f"step-{STEPS}"]

    def check_readable(self, *hosts: Host) -> None:
        """A lost rank is one line for each host, with its name, and no traceback."""
        for host in hosts:
            said = self.said(host)
            assert len([line for line in said.splitlines() if f"error: {host.name}, rank " in line]) == 1, said
            assert "Traceback" not in said

    def check_grid(self) -> None:
        """Each tensor group must lie on a host of its own."""
        said = self.said(self.hosts[0])
        assert "  nodeA  ranks 0–1  data 0  tensor 0–1" in said
        assert "  nodeB  ranks 2–3  data 1  tensor 0–1" in said

    def losses(self) -> Losses:
        return losses_of(self.run)

    def _output(self, host: Host) -> Path:
        return self.folder / f"{host.name}.txt"

    def _any_ended(self) -> bool:
        return any(launcher.poll() is not None for launcher in self.launchers.values())

    def _all_said(self) -> str:
        return "\n".join(f"--- {host.name}\n{self.said(host)}" for host in self.launchers)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_hosts() as hosts:
        yield Nodes(hosts, tmp_path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The run on one host, in the same layout, that nothing befalls."""
    folder = tmp_path_factory.mktemp("straight")
    process = torchrun(4, "train.py", *small(folder), *LAYOUT, *LENGTH, timeout=TIMEOUT)
    assert process.returncode == 0, process.stderr
    return losses_of(folder / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    process = python("train.py", *small(folder), *LAYOUT, *LENGTH, "parallel.tensor=1", timeout=TIMEOUT)
    assert process.returncode == 0, process.stderr
    return losses_of(folder / "run")


def losses_of(run: Path) -> Losses:
    return [(row["step"], row["loss"]) for row in train_rows(run)]


def close_to(losses: Losses) -> Losses:
    """The same to what sums in another order differ by."""
    return [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses]


def test_two_hosts_are_apart_and_can_be_parted(tmp_path: Path) -> None:
    serve = "import socket; server = socket.create_server(('', 5000)); [server.accept() for _ in iter(int, 1)]"
    reach = "import socket; socket.create_connection(('nodeA', 5000), timeout=1); print(socket.gethostname())"
    output = tmp_path / "output.txt"
    with two_hosts() as (first, second):
        server = first.start([sys.executable, "-c", serve], output)

        def reached() -> bool:
            return second.start([sys.executable, "-c", reach], output).wait() == 0

        deadline = time.monotonic() + TIMEOUT
        while not reached():
            assert time.monotonic() < deadline
        assert output.read_text().splitlines()[-1] == "nodeB"
        second.cut()
        assert not reached()
        second.reconnect()
        while not reached():
            assert time.monotonic() < deadline
        sleeper = second.start(["setsid", "--fork", "sleep", "1000"], output)
        assert sleeper.wait() == 0
        assert second.processes()
        first.kill()
        assert not first.processes()
        assert server.wait() != 0
        assert not reached()
    assert not Path("/etc/netns", second.namespace).exists()
    assert second.namespace not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


@pytest.mark.long
def test_two_hosts_train_as_one(nodes: Nodes, straight: Losses, alone: Losses) -> None:
    for host in nodes.hosts:
        nodes.start(host, *TORCHRUN)
    assert nodes.wait_for_end(*nodes.hosts) == [0, 0]
    assert nodes.losses() == straight
    assert nodes.losses() == close_to(alone)
    nodes.check_grid()


@pytest.mark.long
def test_a_cable_is_out_for_longer_than_the_timeout(nodes: Nodes, straight: Losses) -> None:
    first, second = nodes.hosts
    for host in nodes.hosts:
        nodes.start(host, *TORCHRUN)
    nodes.train_until_struck()
    second.cut()
    nodes.wait_until(lambda: all(GONE in nodes.said(host) for host in nodes.hosts), "both notice")
    second.reconnect()
    assert nodes.wait_for_end(first, second) == [0, 0]
    nodes.check_continued(data=2)
    nodes.check_readable(first, second)
    assert nodes.losses() == straight


@pytest.mark.long
@pytest.mark.parametrize("end", ["fail", "kill"])
def test_a_host_fails_and_is_started_again(nodes: Nodes, straight: Losses, end: str) -> None:
    first, second = nodes.hosts
    for host in nodes.hosts:
        nodes.start(host, *TORCHRUN)
    nodes.train_until_struck()
    getattr(second, end)()
    nodes.wait_until(lambda: GONE in nodes.said(first), "the other host notices")
    second.reconnect()
    nodes.start(second, *TORCHRUN)
    assert nodes.wait_for_end(first, second) == [0, 0]
    nodes.check_continued(data=2)
    nodes.check_readable(first)
    assert nodes.losses() == straight


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_fails_ends_ranks_that_hang(nodes: Nodes, lost: int) -> None:
    """Their main threads sleep, as in a call to a device, and no connection is closed. The first host has the store."""
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "nodeA", "MASTER_PORT": "29500"}
    command = [sys.executable, "tests/support/hanging.py", "5", "30", "10000"]
    outputs = [nodes.folder / f"{rank}.txt" for rank in range(4)]
    ranks = [
        nodes.hosts[rank // 2].start(command, output, RANK=str(rank), LOCAL_RANK=str(rank % 2), **common)
        for rank, output in enumerate(outputs)
    ]
    nodes.wait_until(lambda: all("hangs" in output.read_text() for output in outputs), "all ranks hang")
    began = time.monotonic()
    nodes.hosts[lost].fail()
    first = 2 - 2 * lost  # of the two ranks that are left
    left = ranks[first : first + 2]
    nodes.wait_until(lambda: all(rank.poll() is not None for rank in left), "the ranks of the other host end")
    print(f"ended after {time.monotonic() - began:.0f} s: {outputs[first].read_text()}")
    assert [rank.returncode for rank in left] == [1, 1]
    gone = "nodeB, rank 2; nodeB, rank 3; the same" if lost else "nodeA, rank 0; the same"
    assert f"rank {2 * lost + 1} sent no beat for 30 s): no answer from {gone}" in outputs[first].read_text()
    assert "error" not in outputs[first + 1].read_text()


@pytest.mark.long
def test_the_host_where_they_meet_fails_and_is_started_again(nodes: Nodes, straight: Losses) -> None:
    """torchrun's other agents end with it: each host starts its own anew until the run is done, as a service does."""
    first, second = nodes.hosts
    again = ["sh", "-c", f'until "$@" || grep -qs stopped {nodes.run}/state; do sleep 1; done', "sh"]
    command = [*again, sys.executable, "launch/submit.py", *TORCHRUN, *nodes.arguments]
    for host in nodes.hosts:
        nodes.start_command(host, command)
    nodes.train_until_struck()
    first.kill()
    nodes.wait_until(lambda: GONE in nodes.said(second), "the other host notices")
    nodes.start_command(first, command)
    assert nodes.wait_for_end(first, second) == [0, 0]
    nodes.check_continued(data=2)
    assert nodes.losses() == straight


@pytest.mark.long
def test_a_host_never_comes_back(nodes: Nodes, straight: Losses) -> None:
    first, second = nodes.hosts
    for host in nodes.hosts:
        nodes.start(host, *TORCHRUN, "launch.nodes=1:2")
    nodes.train_until_struck()
    second.fail()
    assert nodes.wait_for_end(first) == [0]
    nodes.check_continued(data=1)
    nodes.check_readable(first)
    assert nodes.losses() == close_to(straight)


@pytest.mark.long
def test_a_tensor_group_on_two_hosts_is_refused_unless_allowed(nodes: Nodes, straight: Losses) -> None:
    first, second = nodes.hosts
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "nodeA:29500"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "train.py", *nodes.arguments, "stop_at=3"]
    for host in nodes.hosts:
        nodes.start_command(host, command)
    assert nodes.wait_for_end(first, second) == [1, 1]
    errors = [line for line in nodes.said(first).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "rank 0 on nodeA, rank 1 on nodeB" in errors[0]
    assert "parallel.allow_cross_node=true" in errors[0]
    assert "error: " not in nodes.said(second)
    assert not nodes.run.exists()
    for host in nodes.hosts:
        nodes.start_command(host, [*command, "parallel.allow_cross_node=true"])
    assert nodes.wait_for_end(first, second) == [0, 0]
    assert nodes.losses() == close_to(straight[:3])


@pytest.mark.long
def test_accelerate_starts_the_same_run(nodes: Nodes, straight: Losses) -> None:
    nodes.arguments.append("stop_at=6")
    for rank, host in enumerate(nodes.hosts):
        nodes.start(
            host, "launch=accelerate", "launch.config=launch/accelerate/cpu-many.yaml", "launch.nodes=2",
            "launch.processes=2", "launch.address=nodeA", f"launch.rank={rank}",
        )  # fmt: skip
    assert nodes.wait_for_end(*nodes.hosts) == [0, 0]
    nodes.check_grid()
    assert nodes.losses() == straight[:6]


@pytest.mark.long
def test_deepspeed_starts_the_same_run(nodes: Nodes, straight: Losses) -> None:
    if missing := [tool for tool in ("pdsh", "ssh", "sshd", "ssh-keygen") if shutil.which(tool) is None]:
        pytest.skip(f"DeepSpeed's launcher needs {', '.join(missing)}")
    first, _ = nodes.hosts
    path = serve_ssh(nodes)
    hostfile = nodes.folder / "hosts"
    hostfile.write_text("nodeA slots=2\nnodeB slots=2\n")
    nodes.arguments.append("stop_at=6")
    nodes.start(
        first, "launch=deepspeed", f"launch.hostfile={hostfile}", "launch.nodes=2", "launch.processes=2",
        f"launch.address={first.address}", PATH=path,
    )  # fmt: skip
    assert nodes.wait_for_end(first) == [0]
    nodes.check_grid()
    assert nodes.losses() == straight[:6]


def serve_ssh(nodes: Nodes) -> str:
    """Start an ssh server on each host that lets its root in without a password; a PATH whose `ssh` asks them so."""
    folder = nodes.folder / "ssh"
    folder.mkdir()
    key, log = folder / "key", folder / "log.txt"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (folder / "server").write_text(
        f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
        'SetEnv OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""\n'
    )
    (folder / "client").write_text(
        f"IdentityFile {key}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    shim = folder / "bin" / "ssh"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "client"} "$@"\n')
    shim.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where the server locks itself in; a package's service would make it
    path = f"{shim.parent}:{os.environ['PATH']}"
    for host in nodes.hosts:
        host.start([str(shutil.which("sshd")), "-D", "-e", "-f", str(folder / "server")], log)
    for host in nodes.hosts:
        nodes.wait_until(
            lambda host=host: nodes.hosts[0].start(["ssh", host.name, "true"], log, PATH=path).wait() == 0,  # type: ignore[misc]
            f"{host.name} serves ssh",
        )
    return path
