"""The command `opt-parallel`: its help, its mistakes, its completion, and a wheel outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, environment

import opt_parallel
from opt_parallel.__main__ import COMMANDS, HELP
from opt_parallel.completion import SHELLS

THIN = ["train.py", "launch/submit.py", *(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]


def outside(folder: Path, *arguments: str, package: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a Python command in `folder` with the package of the folder `package`."""
    variables = environment(PYTHONPATH=str(package))
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


FORKS = """
import json, os, sys
from importlib import import_module
for name in ("config.reference", "commands.train", "commands.submit", "commands.export", "commands.checkpoint"):
    import_module(f"opt_parallel.{name}")
from hydra.core.plugins import Plugins
from opt_parallel.__main__ import main
Plugins.instance()
for number, words in enumerate(json.loads(sys.argv[1])):
    sys.stdout.flush()
    if os.fork() == 0:
        for name, stream in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["opt-parallel", *words]
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def forked(folder: Path, output: Path, commands: Sequence[list[str]], package: Path = ROOT) -> list[Any]:
    """The results of several `opt-parallel` commands in `folder`, as forks of one process that has their modules."""
    output.mkdir()
    done = outside(folder, "-c", FORKS, json.dumps(commands), str(output), package=package)
    assert done.returncode == 0, done.stderr
    results = []
    for number, (words, status) in enumerate(zip(commands, done.stdout.split(), strict=True)):
        said = [(output / f"{number}.{name}").read_text() for name in ("out", "err")]
        results.append(subprocess.CompletedProcess(words, int(status), *said))
    return results


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the files that it needs, as pip lets setuptools build it."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("opt_parallel", "configs", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(made)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = made.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The content of the wheel, in a folder for PYTHONPATH."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_every_command_has_a_line_in_the_help_and_a_module() -> None:
    modules = {path.stem for path in (ROOT / "opt_parallel" / "commands").glob("[!_]*.py")}
    assert modules == set(COMMANDS)
    for name in COMMANDS:
        assert callable(import_module(f"opt_parallel.commands.{name}").run)
        assert HELP.count(f"\n  {name} ") == 1


@pytest.mark.parametrize("path", THIN)
def test_a_file_of_the_checkout_only_calls_its_command(path: str) -> None:
    text = (ROOT / path).read_text()
    own = path.startswith("scripts/") and "opt_parallel.commands" not in text
    assert own == (Path(path).stem in ("demo_text", "reference", "wordnet_baselines", "wordnet_text"))
    assert own or len(text.splitlines()) < 10


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_the_front_page_imports_no_library(words: list[str], tmp_path: Path) -> None:
    show = "import sys; from opt_parallel.__main__ import main; main(); print(*sys.modules, file=sys.stderr)"
    done = outside(tmp_path, "-c", show, *words)
    assert done.stdout == (f"opt-parallel {opt_parallel.__version__}\n" if words == ["--version"] else HELP)
    assert not {"torch", "hydra", "numpy", "yaml"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "trian is not a command: did you mean opt-parallel train?"),
        (["model=opt-tiny"], "model=opt-tiny is not a command: opt-parallel --help lists the commands"),
        (["hf_token=hf_abcdefghijklmnopqrstuvwxyz0123"], "hf_token=… is not a command"),
        (["--shell-completion", "csh"], "--shell-completion csh is not a shell: choose bash, zsh, fish"),
        (["--shell-completion"], "--shell-completion is given no shell: choose bash, zsh, fish"),
    ],
)
def test_a_mistake_in_the_first_word_is_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    done = outside(tmp_path, "-m", "opt_parallel", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1


COMPLETIONS = {
    "opt-parallel ex": "export",
    "opt-parallel --v": "--version",
    "opt-parallel --shell-completion ": "bash zsh fish",
    "opt-parallel export --che": "--checkpoint",
    "opt-parallel export --dtype b": "bfloat16",
    "opt-parallel checkpoint ": "list show verify diff",
    "opt-parallel checkpoint diff --m": "--most",
    "opt-parallel compare runs/": "",  # the shell completes files
    "opt-parallel train model=opt-t": "model=opt-tiny",
    "opt-parallel train model=opt-tiny optimizer.l": "optimizer.lr=",
    "opt-parallel prepare zero.offload=": "zero.offload=none zero.offload=cpu",
    "opt-parallel submit launch.no": "launch.nodes=",
    "opt-parallel submit launch=s": "launch=slurm",
    "opt-parallel nothing ": "",
}


OF_A_USER = [
    ["train", "--config-dir", "my", "experiment=mine", "--cfg", "job"],
    ["train", "--config-dir", ".", "--config-name", "own", "model=opt-tiny", "--cfg", "job"],
]


@pytest.fixture(scope="module")
def answers(site: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The results of completions and of commands with a user's configurations, from one process."""
    folder = tmp_path_factory.mktemp("user")
    mine = folder / "my" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ndefaults:\n  - override /model: opt-tiny\nsteps: 7\n")
    (folder / "own.yaml").write_text(
        "defaults: [config, _self_]\nhydra: {searchpath: ['pkg://opt_parallel.configs']}\n"
    )
    lines = list(COMPLETIONS)[:: 1 if request.config.getoption("long") else 4]
    commands = [*(["--complete", line] for line in lines), *OF_A_USER]
    results = forked(folder, tmp_path_factory.mktemp("output") / "of", commands, site)
    assert {path.name for path in folder.iterdir()} == {"my", "own.yaml"}
    return dict(zip([*lines, "experiment", "own"], results, strict=True))


def test_completion(answers: dict[str, Any]) -> None:
    for line, done in list(answers.items())[: -len(OF_A_USER)]:
        assert (done.stdout.strip(), done.stderr, done.returncode) == (COMPLETIONS[line], "", 0), line


def test_bash_completes_with_the_script_that_is_printed(tmp_path: Path) -> None:
    (tmp_path / "opt-parallel").write_text(f'#!/bin/sh\nexec {sys.executable} -m opt_parallel "$@"\n')
    (tmp_path / "opt-parallel").chmod(0o755)
    script = outside(tmp_path, "-m", "opt_parallel", "--shell-completion", "bash").stdout
    assert script == SHELLS["bash"]
    typed = "opt-parallel train model=opt-ti"
    ask = f"COMP_LINE='{typed}'; COMP_POINT={len(typed)}; _opt_parallel; echo \"${{COMPREPLY[@]}}\""
    variables = environment(PYTHONPATH=str(ROOT), PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], env=variables, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("model=opt-tiny\n", "")


def test_the_wheel_holds_the_configurations_and_templates(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "opt-parallel = opt_parallel.__main__:main" in archive.read(entry).decode()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(files) > 30
    assert {f"opt_parallel/{file}" for file in files} <= names
    templates = [*(ROOT / "launch").rglob("*.yaml"), *(ROOT / "launch").rglob("*.sbatch")]
    inside = {f"opt_parallel/launching/templates/{path.relative_to(ROOT / 'launch')}" for path in templates}
    assert inside <= names
    assert not [name for name in names if name.startswith(("tests", "scripts", "configs", "launch"))]


@pytest.mark.long
def test_the_wheel_works_outside_of_the_checkout(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    where = outside(folder, "-c", "import opt_parallel; print(opt_parallel.__file__)", package=site)
    assert where.stdout.strip() == str(site / "opt_parallel" / "__init__.py")
    commands = [
        ["train", "--help"],
        ["train", "modle=opt-tiny"],
        ["submit", "launch=slurm", "launch.dry_run=true", "model=opt-tiny"],
        ["submit", "launch=accelerate", "launch.config=cpu-one.yaml", "launch.dry_run=true"],
        ["submit", "--help"],
    ]
    keys, refused, slurm, accelerate, settings = forked(folder, tmp_path / "output", commands, site)
    assert "opt-parallel train model=" in keys.stdout
    assert "parallel.tensor=1" in keys.stdout
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "modle" in refused.stderr
    assert "-m opt_parallel train model=opt-tiny\n" in slurm.stdout
    assert f"{site}/opt_parallel/launching/templates/accelerate/cpu-one.yaml" in accelerate.stdout
    assert "launch.partition: null" in settings.stdout
    assert not list(folder.iterdir())


def test_a_folder_of_the_user_stands_beside_the_installed_one(answers: dict[str, Any]) -> None:
    assert "\nsteps: 7\n" in answers["experiment"].stdout, answers["experiment"].stderr
    assert "hidden_size" in answers["own"].stdout, answers["own"].stderr


@pytest.mark.long
def test_a_run_from_text_to_export_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    """With the wheel alone, by one process and by two under torchrun."""
    small = [
        "model=opt-tiny", "precision=fp32", "data.sequence_length=16", "batch.global=4", "batch.micro=2", "steps=3",
        "logging.wandb=disabled", "schedule.warmup_steps=0", "data.train=python:validation",
    ]  # fmt: skip
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "opt_parallel", "train"]
    commands = {
        "prepare": [*small],
        "train": [*small, "run.name=one"],
        "export": ["--checkpoint", "runs/one/checkpoints/step-3", "--output", "export"],
        "verify": ["--checkpoint", "export"],
        "generate": ["--checkpoint", "export", "--prompt", "The function", "--max-new-tokens", "4"],
        "torchrun": [*two, *small, "run.name=two", "parallel.tensor=2"],
        "compare": ["runs/one", "runs/two"],
    }
    for name, words in commands.items():
        command = words if name == "torchrun" else ["-m", "opt_parallel", name, *words]
        done = outside(tmp_path, *command, package=site, timeout=600)
        assert done.returncode == 0, (name, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "compare.png", "export", "runs"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"one", "two"}
    assert "data(1) × tensor(2)" in (tmp_path / "runs" / "two" / "logs" / "rank-00000.log").read_text()
