"""wandb over a run's life: one name, whatever is resumed; the user's environment counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command import python, small

from opt_parallel.config.data import DataConfig
from opt_parallel.config.output import LoggingConfig, Wandb
from opt_parallel.config.run import Run, RunConfig
from opt_parallel.report.trackers import WANDB_ID, check_trackers, wandb_id, wandb_mode
from opt_parallel.runtime.errors import UserError


@pytest.fixture(autouse=True)
def no_wandb_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)


def run_in(folder: Path, mode: Wandb = Wandb.offline) -> Run:
    return Run(
        run=RunConfig("a-run", str(folder)), logging=LoggingConfig(wandb=mode, tensorboard=False), steps=4,
        data=DataConfig(sequence_length=16),
    )  # fmt: skip


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    name = wandb_id(Wandb.offline, tmp_path)
    assert name is not None
    assert wandb_id(Wandb.offline, tmp_path) == wandb_id(Wandb.offline, tmp_path, "of-a-checkpoint") == name
    (tmp_path / WANDB_ID).unlink()
    assert wandb_id(Wandb.offline, tmp_path, "of-a-checkpoint") == "of-a-checkpoint"
    (tmp_path / WANDB_ID).write_bytes(b"\xff\0 torn")
    assert wandb_id(Wandb.offline, tmp_path, "of-a-checkpoint") == "of-a-checkpoint"


def test_a_branch_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = wandb_id(Wandb.offline, tmp_path)
    branch = wandb_id(Wandb.offline, tmp_path, saved=name, new=True)
    assert branch != name
    assert wandb_id(Wandb.offline, tmp_path, saved=name) == branch  # from here on
    assert capsys.readouterr().out == f"wandb: run {branch} branches off run {name}\n"


def test_without_wandb_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_id(Wandb.disabled, tmp_path) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_id(Wandb.online, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "setting", "counts"),
    [
        ("disabled", Wandb.online, Wandb.disabled), ("dryrun", Wandb.online, Wandb.offline),
        ("online", Wandb.offline, Wandb.online), ("run", Wandb.offline, Wandb.online), ("", Wandb.online, Wandb.online),
        ("online", Wandb.disabled, Wandb.disabled),  # nobody calls wandb then
    ],
)  # fmt: skip
def test_the_mode_of_the_environment_counts(
    monkeypatch: pytest.MonkeyPatch, mode: str, setting: Wandb, counts: Wandb
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_mode(setting) is counts


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE=ofline does not exist: choose online"):
        check_trackers(Wandb.offline)


@pytest.mark.long
def test_what_else_the_environment_says_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    from opt_parallel.report.trackers import open_trackers
    from opt_parallel.runtime.clock import Clock

    wandb.teardown()  # of an earlier test, which remembers its environment
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, value in {"PROJECT": "my-project", "NAME": "my-name", "DIR": str(elsewhere), "RUN_ID": "my-id"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tracker,) = open_trackers(run_in(tmp_path / "run"), Clock()).active
    tracker.finish()
    wandb.teardown()
    (recorded,) = elsewhere.glob("wandb/offline-run-*-my-id/run-my-id.wandb")
    assert b"my-project" in recorded.read_bytes()
    assert b"my-name" in recorded.read_bytes()
    said = capsys.readouterr().out
    assert said == (
        f"wandb follows the environment: WANDB_PROJECT=my-project, WANDB_NAME=my-name, WANDB_DIR={elsewhere}, "
        "WANDB_RUN_ID=my-id\n"
    )


@pytest.mark.long
def test_the_name_goes_on_and_a_branch_gets_another(tmp_path: Path) -> None:
    """Over starts of train.py: stopped, resumed, gone back to an earlier checkpoint, branched into another folder."""

    def name_after(folder: Path, *arguments: str) -> str:
        process = python("train.py", *arguments, f"run.dir={folder}")
        assert process.returncode == 0, process.stderr
        name = (folder / WANDB_ID).read_text().strip()
        newest = max((folder / "checkpoints").glob("step-?"), key=lambda path: path.name)
        assert json.loads((newest / "manifest.json").read_text())["wandb_id"] == name
        said.append(process.stdout)
        return name

    said: list[str] = []
    run, other = tmp_path / "run", tmp_path / "other"
    arguments = [*small(tmp_path), "steps=6", "checkpoint.every=2", "checkpoint.keep=9", "logging.wandb=offline"]
    name = name_after(run, *arguments, "stop_at=2")
    assert name_after(run, *arguments, "stop_at=4") == name
    assert name_after(run, *arguments, f"resume={run}/checkpoints/step-4") == name  # the newest: no branch
    back = name_after(run, *arguments, f"resume={run}/checkpoints/step-2", "stop_at=4")
    assert back != name
    assert f"wandb: run {back} branches off run {name}" in said[-1]
    assert name_after(run, *arguments) == back
    assert name_after(other, *arguments, f"resume={run}/checkpoints/step-4") not in (name, back)
    assert {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")} == {name, back}
