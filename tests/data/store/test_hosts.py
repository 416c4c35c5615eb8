"""Several hosts that share a cache and no locks build a token store together: its bytes are those of one host."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from command import ROOT, environment, fork_server
from fork_server import Forked

SCRIPT = ROOT / "tests" / "support" / "preparing_host.py"
TEXTS = [f"document {number} has some words and no more" for number in range(100)]
TEXTS += TEXTS[3:40:9]  # duplicates


def write(folder: Path, texts: list[str] = TEXTS) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def start(folder: Path, host: str, hosts: str = "", action: str = "none", document: int = -1) -> Forked:
    """Start a host, together with the other `hosts`. Its output is in HOST.out."""
    arguments = [str(SCRIPT), str(folder / "text.jsonl"), str(folder / "cache"), host, hosts, action, str(document)]
    with (folder / f"{host}.out").open("wb") as file:
        env = environment(SLURMD_NODENAME=host)
        return fork_server().start(arguments, ROOT, env, file.fileno(), file.fileno())


def ended(*hosts: Forked) -> list[int]:
    assert all(host.ended_within(60) for host in hosts)
    return [host.status for host in hosts]


def bytes_of(cache: Path) -> dict[str, bytes]:
    """The files of the token store, and nothing else is left in the cache except locks."""
    others = [path.name for path in cache.iterdir() if path.suffix != ".lock" and not path.name.startswith("store-")]
    assert others == []
    (store,) = (path for path in cache.iterdir() if path.is_dir())
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The bytes of one host's store, and the number of batches that it encoded."""
    folder = tmp_path_factory.mktemp("alone")
    write(folder)
    assert ended(start(folder, "o")) == [0]
    return bytes_of(folder / "cache"), batches(folder, "o")


def batches(folder: Path, host: str) -> int:
    """The number of batches that a host has encoded."""
    return len((folder / f"{host}.log").read_text().splitlines())


@pytest.mark.parametrize(("hosts", "killed"), [("ab", ""), ("abc", "b")])
def test_the_bytes_are_those_of_one_host(
    tmp_path: Path, alone: tuple[dict[str, bytes], int], hosts: str, killed: str
) -> None:
    write(tmp_path)
    running = [start(tmp_path, host, hosts, "kill" if host == killed else "none", 80) for host in hosts]
    statuses = ended(*running)
    assert bytes_of(tmp_path / "cache") == alone[0]
    shares = [batches(tmp_path, host) for host in hosts]
    assert min(shares) > 0
    assert sum(shares) < 2 * alone[1]
    said = "".join((tmp_path / f"{host}.out").read_text() for host in hosts)
    assert (sorted(statuses) == [-signal.SIGKILL, 0, 0]) is ("which has ended, is taken over" in said)


def test_the_host_with_the_document_that_kills_it(tmp_path: Path, alone: tuple[dict[str, bytes], int]) -> None:
    """Whichever host gets the document, the hosts that are left complete the store."""
    write(tmp_path)
    assert ended(start(tmp_path, "a", "", "kill", 80)) == [-signal.SIGKILL]
    assert ended(start(tmp_path, "b", "bc"), start(tmp_path, "c", "bc")) == [0, 0]
    assert bytes_of(tmp_path / "cache") == alone[0]
    said = (tmp_path / "b.out").read_text() + (tmp_path / "c.out").read_text()
    assert "the work of a-" in said
    assert "which has ended, is taken over" in said
    assert batches(tmp_path, "b") + batches(tmp_path, "c") < alone[1]  # parts of the first host stay


def test_a_host_that_was_only_stopped(tmp_path: Path, alone: tuple[dict[str, bytes], int]) -> None:
    """Its work was taken over, and when it continues, it finds the store complete."""
    write(tmp_path)
    stopped = start(tmp_path, "a", "", "stop", 30)
    deadline = time.monotonic() + 60
    while open(f"/proc/{stopped.pid}/stat").read().split()[2] != "T":  # noqa: SIM115
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ended(start(tmp_path, "b")) == [0]
    assert bytes_of(tmp_path / "cache") == alone[0]
    os.kill(stopped.pid, signal.SIGCONT)
    assert ended(stopped) == [0]
    assert bytes_of(tmp_path / "cache") == alone[0]


def test_all_hosts_name_the_same_bad_record(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + '{"text": 3}\n')
    assert ended(start(tmp_path, "a", "ab"), start(tmp_path, "b", "ab")) == [2, 2]
    lines = {(tmp_path / f"{host}.out").read_text().splitlines()[-1] for host in "ab"}
    (line,) = lines
    assert f"line {len(TEXTS) + 1}: 'text' is 3, not a string" in line
    assert f"1 of {len(TEXTS) + 1} records is bad" in line
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
