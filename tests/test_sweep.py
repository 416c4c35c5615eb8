"""A sweep's folders, and what is said of its runs that fail where they are jobs elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import python, small, train_rows

from opt_parallel.sweep import LONGEST_NAME, folder_name


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
