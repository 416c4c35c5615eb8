"""Start a run by a launch system. The command line is split into overrides of `launch` and of `train`, and both
configurations are composed and checked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from opt_parallel.checkpoint.inherit import start_from_checkpoint
from opt_parallel.config.compose import CONFIGS, TEXTS, register_schema, run_from, verbatim
from opt_parallel.config.model import require
from opt_parallel.config.overrides import checked
from opt_parallel.config.paths import change_paths, local, refuse_breaks, text_keys
from opt_parallel.config.run import Run, RunConfig
from opt_parallel.config.values import check_values
from opt_parallel.launching.commands import Command, accelerate, deepspeed, torchrun
from opt_parallel.launching.kubernetes import manifests, to_yaml
from opt_parallel.launching.settings import SECTIONS, Accelerate, DeepSpeed, Kubernetes, Launch, Slurm, System, Torchrun
from opt_parallel.launching.slurm import job
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.machine import raise_open_files

LAUNCH_TEXTS = {key for section in SECTIONS.values() for key in text_keys(section, "launch.")}


def submit(arguments: Sequence[str]) -> None:
    """Start `train` with `arguments`, or print what would be started (`launch.dry_run`).

    A launcher that runs on this host replaces this process. Raises: UserError, and Hydra's and OmegaConf's errors."""
    ours, theirs = split_overrides(checked(arguments, TEXTS | LAUNCH_TEXTS))
    launch, run = composed(CONFIGS, ours, theirs)
    check(launch, run)
    started = rendered(launch, run.run, theirs)
    if launch.dry_run:
        print(started, end="\n" if isinstance(started, Command) else "")
    elif isinstance(started, Command):
        exec_command(started)
    elif isinstance(launch, Slurm):
        # Slurm discards the job's output if this folder is missing.
        (run.folder / "logs").mkdir(parents=True, exist_ok=True)
        pipe_to(["sbatch"], started)
    else:
        pipe_to(["kubectl", "apply", "--filename", "-"], started)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of `launch` and the overrides of `train`. Raises: UserError for an option such as --help."""
    ours: list[str] = []
    theirs: list[str] = []
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key.startswith("-"):
            raise UserError(
                f"{argument} is not an override (key=value): submit starts one run; for several runs use the multirun "
                "of train: opt-parallel train -m …"
            )
        (ours if key == "launch" or key.startswith("launch.") else theirs).append(argument)
    return ours, theirs


def composed(configs: Path, ours: Sequence[str], theirs: Sequence[str]) -> tuple[Launch, Run]:
    """Compose both configurations from the folder `configs`, and check each."""
    return composed_launch(configs, ours), composed_run(configs, theirs)


def composed_launch(configs: Path, ours: Sequence[str]) -> Launch:
    """The checked settings of the launch system."""
    with initialize_config_dir(str(configs), version_base="1.3"):
        return launch_from(compose("launch", list(ours)))


def composed_run(configs: Path, theirs: Sequence[str]) -> Run:
    """The checked configuration of the run that is started."""
    register_schema()
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = compose("config", list(theirs), return_hydra_config=True)
        HydraConfig.instance().set_config(config)  # the default of run.name reads the model's name from HydraConfig
        with open_dict(config):
            del config["hydra"]
        check_values(OmegaConf.to_container(config))  # before a message could repeat a secret in a value
        start_from_checkpoint(config, theirs)
        return run_from(config)


def launch_from(config: DictConfig) -> Launch:
    """The checked settings of the launch system that `launch.system` names."""
    names = [system.name for system in System]
    if config.launch.system not in names:
        raise UserError(f"launch.system={config.launch.system} does not exist: choose {', '.join(names)}")
    section = SECTIONS[System[config.launch.system]]
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    for key, value in values["launch"].items():
        check_values(value, f"launch.{key}")
        for text in value if isinstance(value, list) else [value]:
            # A line break in a value would end an #SBATCH line of the script.
            refuse_breaks(f"launch.{key}=", str(text))
    change_paths(values["launch"], section, local, "launch.")
    schema = OmegaConf.create({"launch": OmegaConf.structured(section)})
    launch = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(verbatim(values))).launch)
    assert isinstance(launch, Launch)
    return launch


def check(launch: Launch, run: Run) -> None:
    """Raise UserError unless the run's grid and batch fit the number of processes, for each number of nodes from
    `fewest` to `most`. Any number of nodes may prepare text."""
    if isinstance(launch, Kubernetes) and launch.prepare:
        return
    for nodes in range(launch.fewest, launch.most + 1):
        run.check_world(nodes * launch.processes)
    tensor, processes = run.parallel.tensor, launch.processes
    require(
        launch.most == 1 or processes % tensor == 0 or run.parallel.allow_cross_node,
        f"parallel.tensor={tensor} on launch.processes={processes} per node: a tensor group would span nodes; "
        f"start a multiple of {tensor} processes on each node, or set parallel.allow_cross_node=true",
    )


def rendered(launch: Launch, run: RunConfig, overrides: Sequence[str]) -> Command | str:
    """The command to run, or the text of the batch script or of the manifests."""
    match launch:
        case Torchrun():
            return torchrun(launch, run.name, overrides)
        case DeepSpeed():
            return deepspeed(launch, overrides)
        case Accelerate():
            return accelerate(launch, overrides)
        case Slurm():
            return job(launch, run.name, Path(run.dir).absolute(), overrides)
        case Kubernetes():
            return to_yaml(manifests(launch, overrides))
    raise AssertionError(launch)


def exec_command(command: Command) -> None:
    """Replace this process by `command`. The process id stays, so signals reach the command, whose exit status is
    returned."""
    # The programs of this Python's environment are found even if the environment is not activated.
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    for program in [command.argv[0], *command.needs]:
        require_program(program, path)
    raise_open_files()  # a launcher may host the ranks' key-value store, to which each rank connects
    os.execvpe(command.argv[0], command.argv, {**os.environ, **command.environment, "PATH": path})


def pipe_to(argv: list[str], text: str) -> None:
    """Run `argv` (sbatch, kubectl) with `text` as its standard input, and print its output. Raises: UserError."""
    require_program(argv[0], os.environ.get("PATH", os.defpath))
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{argv[0]} failed: {one_line(Exception(done.stderr))}")
    print(done.stdout, end="")


def require_program(name: str, path: str) -> None:
    """Raise UserError unless the program `name` is in the search path `path`."""
    if shutil.which(name, path=path) is None:
        raise UserError(
            f"{name} is not installed or not in PATH: install it, or print its input with launch.dry_run=true"
        )
