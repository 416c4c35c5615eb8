"""Simulates two hosts by two Linux network namespaces, which are connected by a virtual cable.

Each host has its own address, host name and processes. The two hosts share the file system of the real host.

    with two_hosts() as (first, second):
        launcher = first.start(["torchrun", …], output)     # on nodeA, 10.77.0.1
        second.cut()                                        # the cable is out …
        second.reconnect()                                  # … and in again
        second.fail()                                       # the power is off

The simulation needs Linux, root and iproute2, and `why_not` names a missing requirement.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from command import ROOT, environment

FILES = Path("/etc/netns")  # `ip netns exec NAME` mounts the files in this folder's NAME over those in /etc.
NAMESPACE = re.compile(r"opt-nodes-(\d+)-[AB]")  # The number is the process id of the test session.
NAMES, ADDRESSES = ("nodeA", "nodeB"), ("10.77.0.1", "10.77.0.2")


def why_not() -> str | None:
    """The requirement of simulated hosts that is missing, or None."""
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"two hosts need {' and '.join(missing)} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "two hosts need root, for their network namespaces"
    allowed = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return allowed.stderr.strip() or None


@dataclass(frozen=True)
class Host:
    """A simulated host. The two hosts can resolve each other's host `name`."""

    name: str
    address: str
    namespace: str

    def start(self, command: Sequence[str], output: Path, **env: str) -> subprocess.Popen[bytes]:
        """Start a command in the repository's folder, and append its output to the file `output`."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        with output.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *named, *command],
                cwd=ROOT, env=environment(**env), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """The ids of all processes of the host, in any session, because a launcher gives each rank its own session."""
        return [int(number) for number in _ip("netns", "pids", self.namespace).split()]

    def fail(self) -> None:
        """Simulate a power failure, after which all processes end without a network message.

        `reconnect` starts the host again, without its processes."""
        self.cut()  # the cable is cut first, because the kernel would reset the connections of killed processes
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to all processes until none is left. The kernel resets their connections."""
        while left := self.processes():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self) -> None:
        """Unplug the virtual cable, in both directions."""
        _ip("-netns", self.namespace, "link", "set", "cable", "down")

    def reconnect(self) -> None:
        """Plug the virtual cable in again."""
        _ip("-netns", self.namespace, "link", "set", "cable", "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """A context with the two hosts nodeA and nodeB, which are removed at its end together with their processes."""
    _remove_left_behind()
    hosts = tuple(
        Host(name, address, f"opt-nodes-{os.getpid()}-{name[-1]}")
        for name, address in zip(NAMES, ADDRESSES, strict=True)
    )
    first, second = hosts
    try:
        for host in hosts:
            _write_files(host)
            _ip("netns", "add", host.namespace)
            _ip("-netns", host.namespace, "link", "set", "lo", "up")
        _ip("link", "add", "cable", "netns", first.namespace, "type", "veth",
            "peer", "name", "cable", "netns", second.namespace)  # fmt: skip
        for host in hosts:
            _ip("-netns", host.namespace, "address", "add", f"{host.address}/24", "dev", "cable")
            host.reconnect()
        yield first, second
    finally:
        for host in hosts:
            _remove(host.namespace)


def _write_files(host: Host) -> None:
    """Write the host names to files without a name server, so that a look-up of any other name fails at once."""
    folder = FILES / host.namespace
    folder.mkdir(parents=True)
    known = "".join(f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES, strict=True))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
    (folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")


def _remove_left_behind() -> None:
    """Remove the hosts that a killed test session has left."""
    for name in _namespaces():
        owner = NAMESPACE.fullmatch(name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _remove(name)


def _remove(namespace: str) -> None:
    if namespace in _namespaces():
        Host("", "", namespace).kill()
        _ip("netns", "delete", namespace)
    shutil.rmtree(FILES / namespace, ignore_errors=True)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines()]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
