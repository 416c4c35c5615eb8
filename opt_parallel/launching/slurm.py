"""The batch script of a run, out of launch/slurm/job.sbatch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from opt_parallel.launching.commands import assignments, threads, torchrun_environment, torchrun_options
from opt_parallel.launching.settings import Slurm

TEMPLATE = "launch/slurm/job.sbatch"


def job(launch: Slurm, name: str, folder: Path, root: Path, overrides: Sequence[str]) -> str:
    """The script for sbatch. `folder` is the run's, `root` this repository's; the nodes must share both."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    variables = torchrun_environment(launch) | threads(launch.cpus_per_task, launch.processes)
    inside = _container(launch, launch.container, root) if launch.container else []
    return environment.from_string((root / TEMPLATE).read_text()).render(
        launch=launch,
        name=name,
        logs=str(folder / "logs").replace("%", "%%"),  # sbatch would put the job's id for %j
        state=folder / "state",
        venv=None if launch.container else _venv(launch),
        command=shlex.join([*inside, *assignments(variables), "torchrun", *torchrun_options(launch)]),
        training=shlex.join([str(root / "train.py"), *overrides]),
    )


def _venv(launch: Slurm) -> Path:
    """The environment with the package: the one named, or the one that submits."""
    return Path(launch.venv).absolute() if launch.venv else Path(sys.prefix)


def _container(launch: Slurm, image: str, root: Path) -> list[str]:
    """Apptainer's words: it shows the working folder by itself, this repository it is told to show."""
    gpus = ["--nv"] if launch.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", str(root), image]
