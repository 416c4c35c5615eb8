"""Two hosts on one machine: network namespaces connected by a virtual cable. Each has its own address, host name and
processes. They share the machine's file system.

    with two_hosts() as (first, second):
        launcher = first.start(["torchrun", …], output)     # on nodeA, 10.77.0.1
        second.cut()                                        # the cable is out …
        second.reconnect()                                  # … and in again
        second.fail()                                       # the power is off

Needs Linux, root and iproute2; `why_not` names what is missing.
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

FILES = Path("/etc/netns")  # `ip netns exec NAME` mounts NAME's files over those of /etc
NAMESPACE = re.compile(r"opt-nodes-(\d+)-[AB]")  # with the id of the creating process: test sessions do not collide
NAMES, ADDRESSES = ("nodeA", "nodeB"), ("10.77.0.1", "10.77.0.2")


def why_not() -> str | None:
    """The missing requirement, or None."""
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"two hosts need {' and '.join(missing)} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "two hosts need root, for their network namespaces"
    allowed = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return allowed.stderr.strip() or None


@dataclass(frozen=True)
class Host:
    """One of the two hosts. `name`: its host name, which both hosts resolve."""

    name: str
    address: str
    namespace: str

    def start(self, command: Sequence[str], output: Path, **env: str) -> subprocess.Popen[bytes]:
        """Start a command in the repository's folder; append its output to `output`."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        with output.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *named, *command],
                cwd=ROOT, env=environment(**env), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """All processes of the host, in any session: a launcher gives each rank its own session."""
        return [int(number) for number in _ip("netns", "pids", self.namespace).split()]

    def fail(self) -> None:
        """Lose power: all processes end without a network message. `reconnect` starts the host again, without
        processes."""
        self.cut()  # first, or the system would reset the connections of killed processes
        self.kill()

    def kill(self) -> None:
        """SIGKILL all processes, also those started meanwhile. The system resets their connections."""
        while left := self.processes():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self) -> None:
        """Unplug the cable, in both directions."""
        _ip("-netns", self.namespace, "link", "set", "cable", "down")

    def reconnect(self) -> None:
        """Plug the cable in again."""
        _ip("-netns", self.namespace, "link", "set", "cable", "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """nodeA and nodeB. The end of the context removes them with all their processes."""
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
    """Host names without a name server, so that looking up another name fails at once."""
    folder = FILES / host.namespace
    folder.mkdir(parents=True)
    known = "".join(f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES, strict=True))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
    (folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")


def _remove_left_behind() -> None:
    """Remove the hosts of a killed test session."""
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
