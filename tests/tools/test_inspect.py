"""scripts/checkpoint.py says of real checkpoints what their files and their run's metrics say."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT, python, write_text
from layouts import Layout, run_for
from safetensors.numpy import load_file
from tampering import edit, edit_tables

from opt_parallel.checkpoint.inherit import model_at

RANKS = ("rank-00000.safetensors", "rank-00001.safetensors")


def train_in(folder: Path, layout: Layout) -> None:
    """On the crew: a whole run of four steps with two checkpoints and two validations."""
    from opt_parallel.config.output import CheckpointConfig, EvaluationConfig, LoggingConfig, Wandb
    from opt_parallel.config.run import DataConfig, RunConfig
    from opt_parallel.loop import train

    text = str(folder / "text.jsonl")
    data = DataConfig(train=text, validation=text, sequence_length=16, cache=str(folder / "cache"))
    run = dataclasses.replace(
        run_for(layout, {"vocab_size": 301, "layerdrop": 0.0, "num_hidden_layers": 2}, steps=4),
        data=data,
        evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(every=2, keep=3),
        logging=LoggingConfig(wandb=Wandb.disabled, tensorboard=False),
        run=RunConfig("inspected", str(folder / str(layout))),
    )
    assert train(run) == 0


@pytest.fixture(scope="module")
def runs(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on one process and at tensor 2, where 301 words are padded."""
    folder = tmp_path_factory.mktemp("inspected")
    write_text(folder, 20)
    layouts = {"one": Layout(stage=1, micro=8), "two": Layout(tensor=2, stage=1, micro=8)}
    for layout in layouts.values():
        crew(layout.world)(train_in, folder, layout)
    return {name: folder / str(layout) for name, layout in layouts.items()}


@pytest.fixture
def copy(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run's folder that a test may damage."""
    shutil.copytree(runs["two"], tmp_path / "run")
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str]:
    """Status and output of the script."""
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "checkpoint.py"), run_name="__main__")
    return int(str(ended.value.code)), capsys.readouterr().out


def metric(run: Path, kind: str, step: int) -> str:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(f"{row['loss']:.4f}" for row in rows if row["kind"] == kind and row["step"] == step)


def test_list(copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones with their losses; those that are not, each with what is wrong."""
    whole = copy / "checkpoints" / "step-4"
    for name in ("step-3", "step-5", "step-6", "step-10", "step-12.partial", "step-7.damaged", "step-8.abandoned1"):
        shutil.copytree(whole, whole.with_name(name))
    with open(whole.with_name("step-3") / "rank-00001.safetensors", "r+b") as file:
        file.truncate(1000)
    (whole.with_name("step-5") / "rank-00000.safetensors").unlink()
    (whole.with_name("step-6") / "manifest.json").write_text('{"format": 1')
    (whole.with_name("step-10") / "manifest.json").unlink()
    (whole.with_name("notes")).mkdir()
    status, text = said(capsys, monkeypatch, "list", copy)
    rows = [line.split() for line in text.splitlines()[1:]]
    assert status == 0
    assert [row[0] for row in rows] == [
        "step-2", "step-3", "step-4", "step-5", "step-6", "step-7.damaged", "step-8.abandoned1", "step-10",
        "step-12.partial",
    ]  # fmt: skip
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    for step in (2, 4):
        line = lines[f"step-{step}"]
        assert line.endswith("  complete")
        assert "tensor 2 × data 1, ZeRO-1, fp32" in line
        assert f"  {metric(copy, 'train', step)}  " in line
        assert f"  {metric(copy, 'validation', step)}  " in line
        assert f"  {step * 8 * 16}  " in line  # tokens
    endings = {
        "step-3": "rank-00001.safetensors has another size than manifest.json states",
        "step-5": "rank-00000.safetensors is missing",
        "step-7.damaged": "renamed: damaged",
        "step-8.abandoned1": "renamed: the run resumed from an earlier checkpoint",
        "step-10": "manifest.json is missing",
        "step-12.partial": "left by a killed run",
    }
    for name, ending in endings.items():
        assert lines[name].endswith(ending), lines[name]
    assert "manifest.json cannot be read (" in lines["step-6"]


def test_show(runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs["two"] / "checkpoints" / "step-4"
    status, text = said(capsys, monkeypatch, "show", folder)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    model = model_at(folder, "")
    assert status == 0
    assert lines["all"].split()[-1] == f"{model.parameters():,}"
    embedding, qkv = lines["decoder.embed_tokens.weight"], lines["decoder.layers.*.self_attn.qkv_proj.weight"]
    assert f"301 × {model.hidden_size}  " in embedding
    assert "dim 0 in 2" in embedding
    assert f"3 × {model.hidden_size} × {model.hidden_size}  " in qkv
    assert qkv.split()[-2:] == [str(model.num_hidden_layers), f"{model.num_hidden_layers * 3 * model.hidden_size**2:,}"]
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        elements = sum(values.size for name, values in held.items() if name.startswith("weights/"))
        assert lines[path.name].split()[1:4:2] == [f"{path.stat().st_size:,}", f"{elements:,}"]
    assert metric(runs["two"], "train", 4) in lines["losses"]
    assert metric(runs["two"], "validation", 4) in lines["losses"]
    assert "torch 2." in lines["versions"]
    assert "4 of 4" in lines["step"]


def test_verify(copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of damage is named; only a complete checkpoint has status 0."""
    folder = copy / "checkpoints" / "step-4"
    status, text = said(capsys, monkeypatch, "verify", folder)
    assert (status, "is complete" in text) == (0, True)

    first, second, tables, manifest = (folder / name for name in (*RANKS, "fragments.safetensors", "manifest.json"))
    contents = {path: path.read_bytes() for path in (first, second, tables, manifest)}
    first.write_bytes(contents[first][:-1] + bytes([contents[first][-1] ^ 1]))
    second.unlink()
    status, text = said(capsys, monkeypatch, "verify", folder)
    assert status == 1
    assert text.splitlines() == [
        f"{folder}: {first.name} differs from its checksum", f"{folder}: {second.name} is missing"
    ]  # fmt: skip

    for path in (first, second):
        path.write_bytes(contents[path])
    edit_tables(folder, lambda tables: tables.update({second.name: tables[second.name][1:]}))
    status, text = said(capsys, monkeypatch, "verify", folder)
    assert status == 1
    assert "manifest.json" in text
    assert "has 19,264 elements" in text

    for path in (tables, manifest):
        path.write_bytes(contents[path])
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    status, text = said(capsys, monkeypatch, "verify", folder)
    assert (status, text) == (1, f"{folder}: tokenizer/tokenizer.json has another size than manifest.json states\n")

    manifest.write_text("{")
    status, text = said(capsys, monkeypatch, "verify", folder)
    assert status == 1
    assert text.startswith(f"{folder}: manifest.json cannot be read")


def test_diff_measures_what_the_files_hold(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy on the files of one process, whose fragments are whole tensors; to the three digits printed."""
    a, b = (runs["one"] / "checkpoints" / f"step-{step}" for step in (2, 4))
    status, text = said(capsys, monkeypatch, "diff", a, b, "--most", 99)
    before, after = (load_file(path / "rank-00000.safetensors") for path in (a, b))
    rows = [line.split() for line in text.splitlines() if line.startswith("decoder.")]
    assert status == 0
    assert len(rows) == len(before) / 3
    for name, *figures in rows:
        wanted = []
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            old, new = (held[f"{kind}/{name}"].astype(np.float64) for held in (before, after))
            wanted += [abs(new - old).max(), np.linalg.norm(new - old) / np.linalg.norm(old)]
        assert [float(figure) for figure in figures] == pytest.approx(wanted, rel=6e-3)
    worst = [max(float(figure) for figure in row[2::2]) for row in rows]
    assert worst == sorted(worst, reverse=True)
    assert ["clock.step", "2", "4"] in [line.split() for line in text.splitlines()]


def test_diff_across_layouts(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (runs[name] / "checkpoints" / "step-4" for name in ("one", "two"))
    status, text = said(capsys, monkeypatch, "diff", one, two, "--most", 3)
    lines = text.splitlines()
    rows = [line.split() for line in lines if line.startswith("decoder.")]
    assert status == 0
    assert len(rows) == 3
    assert all(float(row[1]) < 1e-5 for row in rows)  # Adam makes a rounding of a gradient near 0 a small step
    assert all(float(row[2]) < 1e-2 for row in rows)
    assert ["layout.tensor", "1", "2"] in [line.split() for line in lines]
    assert ["config.parallel.tensor", "1", "2"] in [line.split() for line in lines]
    _, text = said(capsys, monkeypatch, "diff", two, two)
    assert "all settings, versions, devices and texts are equal" in text
    assert "tensors are equal" in text


def test_diff_names_another_text_device_and_base(
    runs: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (run / "checkpoints" / "step-4" for run in (runs["two"], copy))
    edit(b, lambda manifest: manifest["text"].update(train="another-text"))
    edit(b, lambda manifest: manifest.update(device="another-device", base={"checkpoint": "model", "checksum": "sum"}))
    edit(b, lambda manifest: manifest["config"]["task"]["lora"].update(rank=8))
    _, text = said(capsys, monkeypatch, "diff", a, b)
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line}
    assert rows["text.train"] == "another-text"
    assert rows["device"] == "another-device"
    assert (rows["base.checkpoint"], rows["base.checksum"]) == ("model", "sum")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "/nowhere"], "/nowhere has no checkpoints"),
        (["verify", "/tmp"], "/tmp has no manifest.json"),
        (["diff", "/nowhere", "/nowhere"], "/nowhere is not a complete checkpoint"),
        (["diff", "a", "b", "--most", "0"], "--most 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    process = python(str(ROOT / "scripts" / "checkpoint.py"), *arguments)
    assert process.returncode == 2
    assert words in process.stderr
    assert len(process.stderr.splitlines()) == 1
