"""The first minute on another machine: what `make` does with the Python, the environment, the disk and the network
that it finds. A real make, venv and pip; what is installed is nothing, or comes from a place that does not answer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What of a clone the set-up reads, with a package that needs nothing."""
    folder = tmp_path / "a clone"
    (folder / "scripts").mkdir(parents=True)
    for name in ("Makefile", "scripts/set_up.sh"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "opt_parallel" / "runtime", folder / "opt_parallel" / "runtime")  # says how many CPUs
    text = (folder / "Makefile").read_text()
    arguments = '--constraint constraints.txt --editable ".[dev]"'
    assert arguments in text
    (folder / "Makefile").write_text(text.replace(arguments, "--requirement pyproject.toml"))
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text("")
    return folder


def program(folder: Path, name: str, *lines: str) -> Path:
    path = folder / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def old(folder: Path, version: str = "3.10") -> Path:
    """A Python that says that it is of another version."""
    return program(folder, f"python{version}", f'case "$2" in *version_info*) printf {version} ;; *) exit 1 ;; esac')


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", ".venv/installed", *arguments], cwd=folder, env={**inherited, **variables}, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that is said, besides make's own word."""
    assert done.returncode == 2
    own = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert len(own) == 1, done.stderr
    assert own[0].startswith("error: ")
    return own[0]


def test_a_python_that_is_too_old_is_named(clone: Path) -> None:
    for version in ("2.7", "3.10", "3.14"):
        line = refused(make(clone, f"PYTHON={old(clone, version)}"))
        assert all(word in line for word in (f"is Python {version}", "3.11, 3.12 or 3.13", "PYTHON=")), line
    assert not (clone / ".venv").exists()
    assert "there is no nonesuch" in refused(make(clone, PYTHON="nonesuch"))
    assert "does not run as Python" in refused(make(clone, "PYTHON=/bin/true"))


def test_no_venv_module_is_named(clone: Path) -> None:
    without = program(clone, "python", f'case "$2" in *ensurepip*) exit 1 ;; esac; exec {sys.executable} "$@"')
    assert f"apt install python{VERSION}-venv" in refused(make(clone, f"PYTHON={without}"))
    assert not (clone / ".venv").exists()


@pytest.mark.long
def test_an_environment_is_made_once_and_afresh_where_it_must(clone: Path) -> None:
    good = f"PYTHON={sys.executable}"
    (clone / ".venv" / "bin").mkdir(parents=True)  # of a Python that is gone, as an earlier version left it
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.10")
    first = make(clone, good)
    assert first.returncode == 0, first.stderr
    assert f"making .venv with Python {VERSION}" in first.stdout
    again = make(clone, good)
    assert "up to date" in again.stdout
    other = program(clone, "python3", "exit 1")  # a default that is no good does not matter any more
    assert "up to date" in make(clone, PATH=f"{other.parent}:{os.environ['PATH']}").stdout
    kept = clone / ".venv" / "kept"
    kept.touch()
    os.utime(clone / "pyproject.toml", (time.time() + 9, time.time() + 9))  # a new version of the package
    updated = make(clone, PATH=f"{other.parent}:{os.environ['PATH']}")
    assert updated.returncode == 0, updated.stderr
    assert kept.exists()
    os.utime(clone / "pyproject.toml", (1, 1))
    for harm in ("interrupted", "moved"):
        kept.touch()
        if harm == "interrupted":
            (clone / ".venv" / "setting-up").touch()
        else:
            clone = clone.rename(clone.with_name("elsewhere"))
            kept = clone / ".venv" / "kept"
        done = make(clone, good)
        assert done.returncode == 0, done.stderr
        assert "making .venv" in done.stdout
        assert not kept.exists(), harm
    assert refused(make(clone, f"PYTHON={old(clone)}"))  # asked for, and no good: the environment stays
    assert "up to date" in make(clone, good).stdout


@pytest.mark.long
def test_killed_half_way_then_again(clone: Path) -> None:
    """In pip, which waits for an index that does not answer."""
    (clone / "pyproject.toml").write_text("--index-url http://10.255.255.1/simple\nsome-package\n")
    with subprocess.Popen(
        ["make", ".venv/installed", f"PYTHON={sys.executable}"], cwd=clone, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 100
        while not (clone / ".venv" / "bin" / "pip").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert (clone / ".venv" / "setting-up").exists()
    assert not (clone / ".venv" / "installed").exists()
    (clone / "pyproject.toml").write_text("")
    again = make(clone, f"PYTHON={sys.executable}")
    assert again.returncode == 0, again.stderr
    assert "making .venv" in again.stdout


def test_no_room_is_named_before_anything_is_made(clone: Path) -> None:
    good = f"PYTHON={sys.executable}"
    small = program(clone, "df", "echo head", "echo disk 1000000 999000 1000 99% /")
    path = f"{small.parent}:{os.environ['PATH']}"
    assert "1 MB are free" in refused(make(clone, good, PATH=path))


@pytest.mark.long
def test_no_network_and_no_room_later_are_named(clone: Path) -> None:
    good = f"PYTHON={sys.executable}"
    (clone / "pyproject.toml").write_text("--index-url http://127.0.0.1:9/simple\nsome-package\n")
    line = refused(make(clone, good, PIP_RETRIES="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", PIP_NO_INDEX="0"))
    assert "package index" in line
    (clone / "pyproject.toml").write_text("--no-index\nsome-package\n")
    assert "pip failed: ERROR: " in refused(make(clone, good))
    broken = clone / ".venv" / "bin" / "python"  # what pip says where it unpacks
    program(clone, "full", 'case "$*" in *pip*) echo "OSError: [Errno 28] No space left on device"; exit 1 ;; esac',
            f'exec {sys.executable} "$@"')  # fmt: skip
    (clone / ".venv" / "setting-up").unlink()
    broken.unlink()
    broken.symlink_to(clone / "programs" / "full")
    assert "TMPDIR" in refused(make(clone, good))
