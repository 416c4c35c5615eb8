"""A run's Slurm batch script, rendered from the template `TEMPLATE`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from opt_parallel.launching.commands import TRAIN, threads, torchrun_environment, torchrun_options
from opt_parallel.launching.settings import TEMPLATES, Slurm
from opt_parallel.runtime.errors import UserError

TEMPLATE = TEMPLATES / "slurm" / "job.sbatch"


def job(launch: Slurm, name: str, folder: Path, overrides: Sequence[str]) -> str:
    """The script for sbatch. All nodes must share `folder`, the run's folder.

    Raises: UserError for a character in `folder` that sbatch would replace."""
    for sign in "%\\":
        if sign in str(folder):
            raise UserError(f"run.dir={folder} holds a {sign}, which Slurm replaces in file names: choose another path")
    templates = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    templates.filters["quote"] = lambda value: shlex.quote(str(value))
    variables = torchrun_environment(launch) | threads(launch.cpus_per_task, launch.processes)
    agent = [*_container(launch, folder), "torchrun", *torchrun_options(launch)]
    return templates.from_string(TEMPLATE.read_text()).render(
        launch=launch,
        name=name,
        logs=folder / "logs",
        state=folder / "state",
        lock=folder / "lock",
        venv=None if launch.container else _venv(launch),
        variables=variables,
        agent=_one_option_per_line(agent),
        training=shlex.join([*TRAIN, *overrides]),
    )


def _venv(launch: Slurm) -> Path:
    """The virtual environment of the job: `launch.venv`, or the environment of this process."""
    return Path(launch.venv).absolute() if launch.venv else Path(sys.prefix)


def _container(launch: Slurm, folder: Path) -> list[str]:
    """The `apptainer exec` command line, or nothing if no container is set. The command mounts the run's folder.
    Apptainer itself mounts the home folder and the working folder. Raises: UserError."""
    if launch.container is None:
        return []
    if set(str(folder)) & set(",:"):
        raise UserError(f"{folder} holds a comma or a colon, which separate paths for Apptainer: choose another folder")
    gpus = ["--nv"] if launch.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", str(folder), os.path.expanduser(launch.container)]


def _one_option_per_line(argv: Sequence[str]) -> str:
    """A command quoted for a shell script, with each option on its own line."""
    return "".join(f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in map(shlex.quote, argv))
