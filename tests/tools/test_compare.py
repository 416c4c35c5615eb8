"""scripts/compare.py: the table's cells and the picture's lines are those of the runs' files; mistakes are one line."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, python

from opt_parallel.config.compose import to_yaml
from opt_parallel.config.data import DataConfig
from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import LoggingConfig, Wandb
from opt_parallel.config.run import OptimizerConfig, Run, RunConfig
from opt_parallel.report.metrics import Metrics
from opt_parallel.report.plots import COLORS, STROKES, Curve, figure_of, smoothed
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.compare import Record, differing, draw, find_runs, labels, read_runs, table

QUIET = LoggingConfig(wandb=Wandb.disabled, tensorboard=False)


def loss_at(step: int, offset: float = 0.0) -> float:
    return 2.0 + offset + 4.0 / step + 0.1 * (step % 3)


def train_in(folder: Path, steps: int = 6, offset: float = 0.0, every: int = 3, **fields: Any) -> Path:
    """A run's folder, written by what writes a real one's: `steps` steps of 10, 20, 30, … tokens, a validation each
    `every`."""
    fields = {"steps": 400, "logging": QUIET, "data": DataConfig(sequence_length=16), **fields}
    run = Run(run=RunConfig(folder.name, str(folder)), **fields)
    metrics, clock = Metrics.open(run, 1, True, torch.device("cpu"), Clock()), Clock()
    for _ in range(steps):
        clock = clock.after(4, 10 * (clock.step + 1))
        metrics.step(clock, loss_at(clock.step, offset), 1.0, 1e-3, None, False, 0.0, {"train": 0.5})
        if clock.step % every == 0:
            metrics.validation(clock, loss_at(clock.step, offset + 1), None)
    metrics.abandon()
    (folder / "config.yaml").write_text(to_yaml(run))
    return folder


def cells_of(text: str) -> dict[str, dict[str, str]]:
    """The table of runs: by a run's number, its cells by their column's head."""
    head, *lines = text.partition("\n\n")[0].splitlines()
    names = re.split(r"\s{2,}", head)
    return {line.split()[0]: dict(zip(names, re.split(r"\s{2,}", line), strict=True)) for line in lines}


def records_of(*folders: Path) -> list[Record]:
    return read_runs(folders)[0]


def test_the_table_says_what_the_files_say(tmp_path: Path) -> None:
    a = train_in(tmp_path / "sweep" / "a", steps=9, optimizer=OptimizerConfig(lr=1e-3))
    train_in(tmp_path / "sweep" / "b", steps=5, offset=1.0, optimizer=OptimizerConfig(lr=1e-4), seed=2)
    rows = cells_of(table(records_of(tmp_path / "sweep")))
    assert list(rows["1"]) == [
        "run", "step", "tokens", "training", "validation", "lowest, at step", "optimizer.lr", "seed", "folder",
    ]  # fmt: skip
    assert list(rows["1"].values()) == [
        "1", "9 of 400", "450", f"{loss_at(9):.4f}", f"{loss_at(9, 1):.4f}", f"{loss_at(9, 1):.4f}, 9", "0.001", "1",
        "a",
    ]  # fmt: skip
    assert list(rows["2"].values()) == [
        "2", "5 of 400", "150", f"{loss_at(5, 1):.4f}", f"{loss_at(3, 2):.4f}", f"{loss_at(3, 2):.4f}, 3", "0.0001",
        "2", "b",
    ]  # fmt: skip
    assert "the last step's loss" in table(records_of(a))


def test_the_lowest_validation_is_not_the_last(tmp_path: Path) -> None:
    train_in(tmp_path / "a")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        for step, loss in ((7, 1.25), (8, None), (9, 3.5)):
            file.write(json.dumps({"kind": "validation", "step": step, "loss": loss, "perplexity": None}) + "\n")
    row = cells_of(table(records_of(tmp_path / "a")))["1"]
    assert (row["validation"], row["lowest, at step"]) == ("3.5000", "1.2500, 7")


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    train_in(tmp_path / "a", steps=2)
    train_in(tmp_path / "b", steps=3, offset=math.nan)
    rows = cells_of(table(records_of(tmp_path / "a", tmp_path / "b")))
    assert [rows[number]["training"] for number in "12"] == [f"{loss_at(2):.4f}", "not finite"]
    assert [rows[number]["lowest, at step"] for number in "12"] == ["—", "—"]
    draw(tmp_path / "picture.png", records_of(tmp_path / "b"), "step")


def test_a_run_that_diverged_is_said_to_have(tmp_path: Path) -> None:
    good, bad, early = train_in(tmp_path / "good"), train_in(tmp_path / "bad"), train_in(tmp_path / "early", steps=0)
    for folder, state in ((good, "done"), (bad, "diverged"), (early, "diverged")):
        (folder / "state").write_text(f"{state}\n")
    records, empty = read_runs([tmp_path])
    assert [cells["step"] for cells in cells_of(table(records)).values()] == ["6 of 400, diverged", "6 of 400"]
    assert empty == [early]
    with pytest.raises(UserError, match="early diverged in its first step"):
        read_runs([early])


def test_a_long_run_s_training_loss_is_the_picture_s(tmp_path: Path) -> None:
    """The mean of the last steps, which is where the smoothed line ends."""
    record = records_of(train_in(tmp_path / "a", steps=200, every=50))[0]
    last = [loss_at(step) for step in range(195, 201)]
    assert record.last_training == pytest.approx(sum(last) / 6, rel=1e-6)
    text = table([record])
    assert f"{sum(last) / 6:.4f}" in text
    assert "mean loss of the last fortieth" in text


def test_many_settings_have_a_table_of_their_own(tmp_path: Path) -> None:
    long = "/some/long/folder/of/texts/that/goes/on/"
    train_in(tmp_path / "a", data=DataConfig(train=f"{long}one.txt", sequence_length=16))
    larger = ModelConfig(hidden_size=1024, num_attention_heads=16, ffn_dim=4096, num_hidden_layers=24, dropout=0.25)
    betas = OptimizerConfig(betas=[0.9, 0.98])
    data = DataConfig(train=f"{long}two.txt", sequence_length=16)
    train_in(tmp_path / "b", model=larger, optimizer=betas, data=data)
    runs = records_of(tmp_path / "a", tmp_path / "b")
    text = table(runs)
    assert list(cells_of(text)["1"])[-2:] == ["lowest, at step", "folder"]
    below = dict(line.split(maxsplit=1) for line in text.rpartition("\n\n")[2].splitlines())
    assert set(below) == {"differs", *differing(runs)}
    assert below["model.hidden_size"].split() == ["768", "1024"]
    assert re.split(r"\s{2,}", below["optimizer.betas"]) == ["[0.9, 0.95]", "[0.9, 0.98]"]
    assert below["data.train"].split() == ["…one.txt", "…two.txt"]
    assert labels(runs) == ["1: a", "2: b"]  # too many settings for a legend


def test_labels_are_what_tells_the_runs_apart(tmp_path: Path) -> None:
    for number, (lr, dropout) in enumerate(((1e-3, 0.0), (1e-3, 0.1), (1e-4, 0.0))):
        train_in(tmp_path / str(number), optimizer=OptimizerConfig(lr=lr), model=ModelConfig(dropout=dropout))
    assert labels(records_of(tmp_path)) == [
        "1: dropout=0, lr=0.001",
        "2: dropout=0.1, lr=0.001",
        "3: dropout=0, lr=0.0001",
    ]
    (tmp_path / "2" / "config.yaml").unlink()  # a copy of the metrics alone
    assert labels(records_of(tmp_path)) == ["1: 0", "2: 1", "3: 2"]
    assert cells_of(table(records_of(tmp_path)))["3"]["step"] == "6"


def test_the_picture_s_lines_are_the_losses(tmp_path: Path) -> None:
    long, short = train_in(tmp_path / "long", 120, seed=1), train_in(tmp_path / "short", 9, offset=1.0, seed=2)
    runs = records_of(long, short)
    curves = [record.curve(label, "tokens") for record, label in zip(runs, labels(runs), strict=True)]
    figure = figure_of("two", curves, "tokens", "token")
    training, validation = figure.axes
    raw, smooth, other = (line.get_xydata() for line in training.lines)
    tokens = [5 * step * (step + 1) for step in range(1, 121)]
    losses = [row["loss"] for row in runs[0].rows if row["kind"] == "train"]
    assert raw.tolist() == [list(pair) for pair in zip(tokens, losses, strict=True)]
    assert smooth[:, 1].tolist() == smoothed(losses)
    assert other[:, 1].tolist() == pytest.approx([loss_at(step, 1.0) for step in range(1, 10)])
    held_out = [line.get_xydata().tolist() for line in validation.lines]
    assert [len(points) for points in held_out] == [40, 3]
    assert held_out[1] == [[5 * step * (step + 1), pytest.approx(loss_at(step, 2.0))] for step in (3, 6, 9)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1: seed=1", "2: seed=2"]
    assert training.get_ylabel() == "loss (nats per token)"


def test_twelve_runs_are_drawn_in_twelve_ways() -> None:
    curves = [Curve(str(number), ([1, 2], [3.0, 2.0]), ([], [])) for number in range(12)]
    (axes,) = figure_of("twelve", curves, "step", None).axes  # no validation, no panel for it
    ways = {(line.get_color(), str(line._dash_pattern)) for line in axes.lines}
    assert len(ways) == 12 <= len(COLORS) * len(STROKES)


def test_a_run_that_diverges_does_not_flatten_the_others() -> None:
    steps = list(range(1, 51))
    fine = Curve("fine", (steps, [10.0] + [3 - step / 100 for step in steps[1:]]), ([], []))
    lost = Curve("lost", (steps, [10.0] + [3.0] * 20 + [10.0**power for power in range(28)] + [math.nan]), ([], []))
    at_once = Curve("at once", (steps, [10.0, 1e3] + [1e9] * 48), ([], []))
    assert figure_of("all", [fine, lost, at_once], "step", "token").axes[0].get_ylim()[1] < 12
    for curves in ([fine, lost], [lost, fine]):
        low, high = figure_of("two", curves, "step", "token").axes[0].get_ylim()
        assert 0.5 < low < 1.0  # the lost one's 10⁰
        assert 3 < high < 4


def test_classifiers_show_their_figures(tmp_path: Path) -> None:
    for name, accuracy in (("a", 0.75), ("b", 0.5)):
        train_in(tmp_path / name, steps=2)
        row = {"kind": "validation", "step": 2, "loss": 0.5, "accuracy": accuracy, "f1_macro": None}
        with open(tmp_path / name / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    rows = cells_of(table(records_of(tmp_path)))
    assert [rows[number]["accuracy"] for number in "12"] == ["0.7500", "0.5000"]
    assert rows["1"]["f1_macro"] == "not finite"
    assert rows["1"]["validation"] == "0.5000"


def test_runs_are_found_once_wherever_they_lie(tmp_path: Path) -> None:
    a, b = train_in(tmp_path / "a"), train_in(tmp_path / "a" / "lr=1")
    inner = tmp_path / "a" / "checkpoints" / "step-1"
    inner.mkdir(parents=True)
    (inner / "metrics.jsonl").write_text("")
    assert find_runs([tmp_path / "a"]) == [a, b]
    assert find_runs([b, tmp_path, a]) == [b, a]


def test_a_run_in_progress(tmp_path: Path) -> None:
    """The last line may be cut. A run without rows is left out, unless it was named."""
    a, empty_run = train_in(tmp_path / "a", steps=4), tmp_path / "empty"
    with open(a / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 5, "loss')
    empty_run.mkdir()
    (empty_run / "metrics.jsonl").write_text("")
    records, empty = read_runs([tmp_path])
    assert [record.reached("step") for record in records] == [4]
    assert empty == [empty_run]
    with pytest.raises(UserError, match=re.escape(f"{empty_run}/metrics.jsonl has no rows yet")):
        read_runs([a, empty_run])


def test_mistakes(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong, words in (
        ([], "no run is named"),
        ([tmp_path / "none"], f"{tmp_path / 'none'} is not a folder"),
        ([empty], f"{empty} contains no metrics.jsonl"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            read_runs(wrong)
    a = train_in(tmp_path / "a")
    lines = (a / "metrics.jsonl").read_text().splitlines(keepends=True)
    for broken in (
        '{"kind": "train", "st\n',
        "[1]\n",
        '{"kind": "train", "step": 3, "loss": "x"}\n',
        '{"kind": "train", "step": 3}\n',
        "\n",
        "7\n",
    ):
        (a / "metrics.jsonl").write_text("".join([*lines[:2], broken, *lines[2:]]))
        with pytest.raises(UserError, match=re.escape(f"{a}/metrics.jsonl, line 3 is damaged")):
            read_runs([a])
    (a / "metrics.jsonl").write_text("".join(lines))
    for broken in ("a: [", "- 1"):
        (a / "config.yaml").write_text(broken)
        with pytest.raises(UserError, match=re.escape(f"{a}/config.yaml")):
            read_runs([a])


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = train_in(tmp_path / "a"), train_in(tmp_path / "b", seed=2)
    picture = tmp_path / "picture.png"
    capsys.readouterr()  # what a run says
    arguments = map(str, ("compare.py", a, b, "--output", picture, "--over", "tokens"))
    monkeypatch.setattr(sys, "argv", list(arguments))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "compare.py"), run_name="__main__")
    assert ended.value.code == 0
    assert cells_of(capsys.readouterr().out)["2"]["seed"] == "2"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    a = train_in(tmp_path / "a")
    blocked = tmp_path / "none" / "x.png"
    with pytest.raises(UserError, match=re.escape(f"--output {blocked} cannot be written: No such file")):
        draw(blocked, records_of(a), "step")
    process = python("scripts/compare.py", str(a), "--output", str(tmp_path / "picture.txt"))
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: --output {tmp_path / 'picture.txt'} cannot be written: ")
    assert process.stderr.count("\n") == 1
    assert not process.stdout
