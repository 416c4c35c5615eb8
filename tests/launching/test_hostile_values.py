"""No value becomes a directive or a command of a rendered script, nor another field of a manifest."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import ROOT
from composing import dry, run_of
from omegaconf import OmegaConf

from opt_parallel.config.compose import run_from, to_dict, verbatim
from opt_parallel.config.paths import text_keys
from opt_parallel.config.run import Run
from opt_parallel.launching.kubernetes import manifests, to_yaml
from opt_parallel.launching.settings import SECTIONS, Kubernetes, System
from opt_parallel.launching.submit import launch_from, rendered
from opt_parallel.runtime.errors import UserError

BREAKS = ["\n", "\r", "\r\n", "\x00", "\x0b", "\x0c", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029", "\udcff"]
SIGNS = [
    "$(touch canary)", "`touch canary`", "; touch canary #", "' ; touch canary ; '", '" ; touch canary ; "',
    "&& touch canary", "| touch canary", "${IFS}touch${IFS}canary", "> canary", "\\", "\\'", "it's", "#", "a #b", "!x",
    "~", "{{ 7*7 }}", "{% raw %}", "$(WANDB_API_KEY)", "a: b", "- x", "*a", "&a", "größe", "--wrap=x",
]  # fmt: skip
NEEDED: dict[System, dict[str, Any]] = {
    System.torchrun: {}, System.slurm: {}, System.deepspeed: {},
    System.accelerate: {"config": str(ROOT / "launch" / "accelerate" / "cpu-one.yaml")},
    System.kubernetes: {"name": "a", "image": "b", "claim": "c"},
}  # fmt: skip
KEYS = [
    (system, key)
    for system, section in SECTIONS.items()
    for key in [*text_keys(section, "launch."), "run.name", "run.dir"]
]  # fmt: skip
SLURM_KEYS = [key for system, key in KEYS if system is System.slurm]
# Each key is tested with a share of the signs, another one than its neighbours.
SHARES = [0, *(pytest.param(share, marks=pytest.mark.long) for share in range(1, 6))]


@functools.cache
def plain_run() -> Run:
    return run_of("model=opt-tiny")


def shown(system: System, key: str = "run.name", text: str = "") -> str:
    """What would be started, with `text` in the value of a key. Raises: UserError."""
    name = key.partition(".")[2]
    value = f"1{text}" if name == "nodes" else f"x{text}y"
    run = plain_run()
    given: dict[str, Any] = {"system": system.name, **NEEDED[system]}
    if key.startswith("run."):
        values = to_dict(run)
        values["run"][name] = value
        run = run_from(OmegaConf.create(verbatim(values)))
    else:
        given[name] = value
    launch = launch_from(OmegaConf.create(verbatim({"launch": given})))
    return str(rendered(launch, run.run, [f"{key}={value}"]))


def run_script(script: str, folder: Path) -> None:
    """The batch script in bash, with programs that do nothing in place of Slurm's."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "squeue", "sbatch", "apptainer"):
        (programs / name).write_text("#!/bin/sh\nexit 0\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(
        ["bash"], input=script, cwd=folder, env=environment, text=True, capture_output=True, check=False
    )
    assert "syntax error" not in done.stderr
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("share", SHARES[:4])
@pytest.mark.parametrize(("system", "key"), KEYS, ids=lambda value: getattr(value, "name", value))
def test_line_breaks_and_control_characters_are_refused(system: System, key: str, share: int) -> None:
    for text in BREAKS[(share + KEYS.index((system, key))) % 4 :: 4]:
        with pytest.raises(UserError) as caught:
            shown(system, key, text)
        assert str(caught.value).startswith(f"{key}=")
        assert str(caught.value).isprintable()


def test_in_a_list_too() -> None:
    with pytest.raises(UserError, match=r"^launch\.options="):
        dry("launch=slurm", "model=opt-tiny", "launch.options=['--qos=a\n#SBATCH --wrap=id']")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("key", SLURM_KEYS)
def test_no_value_becomes_a_command_or_a_directive(key: str, share: int, tmp_path: Path) -> None:
    plain = shown(System.slurm)
    directives = {line.split("=")[0] for line in plain.splitlines() if line.startswith("#SBATCH")}
    for text in SIGNS[(share + SLURM_KEYS.index(key)) % len(SHARES) :: len(SHARES)]:
        try:
            script = shown(System.slurm, key, text)
        except UserError:
            continue  # in one line, before anything is queued
        header = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert {line.split("=")[0] for line in header} <= directives | {"#SBATCH --account", "#SBATCH --partition"}
        assert all(len(shlex.split(line)) == 2 for line in header)
        run_script(script, tmp_path)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("system", [System.torchrun, System.deepspeed, System.accelerate])
def test_a_command_keeps_its_words(system: System, share: int) -> None:
    others = shlex.split(shown(system))
    for number, key in enumerate(key for each, key in KEYS if each is system):
        for text in SIGNS[(share + number) % len(SHARES) :: len(SHARES)]:
            try:
                words = shlex.split(shown(system, key, text))
            except UserError:
                continue
            assert "touch" not in words
            assert len(words) <= len(others) + 8


def test_a_manifest_keeps_its_fields() -> None:
    """And Kubernetes puts no variable of the container, as a Secret's, in the place of $(NAME)."""
    for text in SIGNS:
        launch = Kubernetes(
            system=System.kubernetes, name="a", image=f"x{text}", claim=f"x{text}", secret=f"x{text}",
            mount=f"/x{text}", interface=f"x{text}",
        )  # fmt: skip
        overrides = [f"run.name=x{text}"]
        documents = manifests(launch, overrides)
        assert list(yaml.safe_load_all(to_yaml(documents))) == documents
        pod = documents[1]["spec"]["template"]["spec"]
        container = pod["containers"][0]
        assert (container["image"], container["workingDir"]) == (f"x{text}", f"/x{text}")
        assert [word.replace("$$", "") for word in container["args"][-2:] if "$" in word.replace("$$", "")] == []
        variables = [each["value"].replace("$$", "") for each in container["env"]]
        assert not [value for value in variables if "$" in value]


def test_apptainers_and_slurms_own_signs() -> None:
    image = "x.sif"
    for folder, container, words in (
        ("/a,b", image, "Apptainer"), ("/a:b", image, "Apptainer"), ("/a%j", None, "Slurm"), ("/a\\b", None, "Slurm"),
    ):  # fmt: skip
        given = OmegaConf.create(verbatim({"launch": {"system": "slurm", "container": container}}))
        with pytest.raises(UserError, match=words):
            rendered(launch_from(given), replace(plain_run().run, dir=folder), [])
