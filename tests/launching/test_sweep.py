"""A sweep's folders, and what is said of its runs that fail where they are jobs elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command import launch, python, small, train_rows
from composing import run_of
from hydra.errors import MissingConfigException

from opt_parallel.config.compose import explain
from opt_parallel.launching.sweep import LONGEST_NAME, check_sweep, folder_name
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.rows import rows_of


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["optimizer.lr=0.001", "model.dropout=0.1"], "optimizer.lr=0.001,model.dropout=0.1"),
        (["model=opt-1.3b"], "model=opt-1.3b"),
        (["data.train=python:train"], "data.train=python:train"),
        ([], ""),
    ],
)
def test_plain_values_are_the_name(overrides: list[str], name: str) -> None:
    assert folder_name(overrides) == name


@pytest.mark.parametrize(
    ("override", "beginning"),
    [
        ("data.train=/data/a", "data.train=_data_a-"),
        ("optimizer.betas=[0.9,0.95]", "optimizer.betas=0.9,0.95-"),
        ("data.train=[{path:/a,weight:0.7}]", "data.train=path:_a,weight:0.7-"),
        ("data.template='{title}: {body}'", "data.template=title:_body-"),
        ("data.train=a b\tc", "data.train=a_b_c-"),
        ("data.train=${oc.env:HOME}/*.txt", "data.train=_oc.env:HOME_.txt-"),
        ("data.train=Größe/ß", "data.train=Größe_ß-"),
    ],
)
def test_what_a_shell_or_a_file_system_takes_amiss_is_replaced(tmp_path: Path, override: str, beginning: str) -> None:
    name = folder_name([override])
    assert name.startswith(beginning)
    (tmp_path / name).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_others_have_other_names() -> None:
    """Also where the readable part is the same."""
    values = ["/a/b", "/a_b", "_a/b", "[_a_b]", "_a_b", "'_a b'", "_a b", "x" * 500, "x" * 501]
    assert len({folder_name([f"data.train={value}"]) for value in values}) == len(values)


@pytest.mark.parametrize("letter", ["x", "ß", "語"])
def test_a_long_name_is_cut(tmp_path: Path, letter: str) -> None:
    for length in (60, 90, 100, 200, 1000):
        name = folder_name([f"data.train={letter * length}"])
        assert len(name.encode()) <= LONGEST_NAME
        (tmp_path / name).mkdir()
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_diverges_is_a_result_and_the_others_follow(tmp_path: Path, ranks: int) -> None:
    """In the same process; on two ranks, the run after the one that diverged is the run alone."""
    arguments = [*small(tmp_path), "steps=3", "optimizer.clip=0"]
    process = launch(ranks, "train.py", "-m", *arguments, "optimizer.lr=1e30,1e-4")
    assert process.returncode == 2, process.stderr
    diverged, end = [line for line in process.stderr.splitlines() if not line.startswith("WARNING: DeepSpeed")]
    assert diverged.startswith("optimizer.lr=1e+30 diverged: step 2: ")
    assert end == "error: 1 run of the sweep diverged: optimizer.lr=1e+30"
    folders = [tmp_path / "run" / f"optimizer.lr={value}" for value in ("1e+30", "0.0001")]
    assert [(folder / "state").read_text() for folder in folders] == ["diverged\n", "done\n"]
    first, second = [[row["loss"] for row in train_rows(folder)] for folder in folders]
    assert (len(first), len(second)) == (1, 3)
    assert first[0] == second[0]  # of the same weights and batch
    if ranks == 2:
        process = launch(ranks, "train.py", *arguments, "optimizer.lr=1e-4", f"run.dir={tmp_path / 'alone'}")
        assert process.returncode == 0, process.stderr
        assert [row["loss"] for row in train_rows(tmp_path / "alone")] == second


@pytest.mark.long
def test_a_run_that_diverges_in_a_job_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    arguments = [*small(tmp_path), f"hydra.sweep.dir={tmp_path}", "hydra/launcher=submitit_local", "steps=3"]
    process = python("train.py", "-m", *arguments, "optimizer.clip=0", "optimizer.lr=1e30,1e-4")
    assert process.returncode == 2, process.stderr
    assert "diverge" in process.stderr or "not finite" in process.stderr
    assert [(tmp_path / "run" / f"optimizer.lr={value}" / "state").read_text() for value in ("1e+30", "0.0001")] == [
        "diverged\n", "done\n",
    ]  # fmt: skip


@pytest.mark.long
def test_a_mistake_in_a_job_elsewhere_is_said_once_the_others_have_ended(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    arguments = [*small(tmp_path), f"hydra.sweep.dir={tmp_path}", "hydra/launcher=submitit_local", "steps=2"]
    process = python("train.py", "-m", *arguments, "model.dropout=1.5,0.0,0.1")
    assert process.returncode == 2, process.stderr
    which, what = process.stderr.splitlines()
    assert "'model.dropout=1.5'" in which
    assert what.startswith("error: model.dropout=1.5 must be")
    folders = sorted(path.parent for path in (tmp_path / "run").rglob("metrics.jsonl"))
    assert [folder.name for folder in folders] == ["model.dropout=0.0", "model.dropout=0.1"]
    assert [len(train_rows(folder)) for folder in folders] == [2, 2]


@pytest.mark.long
def test_optuna_minimises_the_validation_loss(tmp_path: Path) -> None:
    """A run that diverges is the worst result, and no error of the search."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
    search = [
        "hparams_search=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.params={optimizer.lr: 'choice(1e-4,1e-2,1e30)'}",
    ]
    fixed = ["steps=3", "optimizer.weight_decay=0.1", "model.dropout=0.0", "optimizer.clip=0", "data.held_out=0.2"]
    arguments = [*small(tmp_path), *search, *fixed, "hydra.sweeper.sampler.seed=2"]
    process = python("train.py", *arguments)
    losses = {}
    for folder in (tmp_path / "run").glob("optimizer.lr=*"):
        rows = [row for row in rows_of(folder / "metrics.jsonl") if row["kind"] == "validation"]
        losses[folder.name] = rows[-1]["loss"] if rows else None
    found = yaml.safe_load((tmp_path / "run" / "optimization_results.yaml").read_text())
    reached = {name: loss for name, loss in losses.items() if loss is not None}
    best = min(reached, key=lambda name: reached[name])
    chosen = ",".join(f"{key}={value}" for key, value in found["best_params"].items())
    assert (chosen, found["best_value"]) == (best, reached[best])
    assert len(reached) < len(losses)
    assert process.returncode == 2
    assert " diverged: " in process.stderr


def test_a_sweeper_that_minimises_needs_validations(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
    search = ["hparams_search=optuna", f"run.dir={tmp_path}", "model=opt-tiny"]
    check_sweep(run_of(*search, "steps=2", "data.held_out=0.2"))
    with pytest.raises(UserError, match=r"^evaluation.every=0, but the sweeper minimises"):
        check_sweep(run_of(*search, "evaluation.every=0"))


def test_a_plugin_that_is_not_installed_is_named() -> None:
    error = MissingConfigException("no sweeper", "hydra/sweeper/optuna", ["basic"])
    assert explain(error).endswith("pip install hydra-optuna-sweeper")
