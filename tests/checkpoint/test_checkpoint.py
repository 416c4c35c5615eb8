"""Saved and resumed: the straight run goes on."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import small, train_rows
from training import trained

from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.checkpoint.store import newest
from opt_parallel.config.output import ExportDtype
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.parallel.shard import Constant, Shard
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export

RUN = [
    "parallel.tensor=2",
    "zero.stage=1",
    "model.layerdrop=0.2",
    "steps=6",
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "model.vocab_size=301",
]


@pytest.fixture(scope="module")
def straight(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run at tensor 2 that was saved at steps 2, 4 and 6, and its arguments."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*small(folder), *RUN]
    process = trained(crew(2), *arguments)
    assert process.returncode == 0, process.stderr
    return folder, arguments


def copy_of(straight: tuple[Path, list[str]], folder: Path, *steps: int) -> tuple[Path, list[str]]:
    """A copy of the run in `folder` with these checkpoints only; its checkpoints, and its arguments."""
    run = folder / "run"
    shutil.copytree(straight[0] / "run", run)
    for path in (run / "checkpoints").glob("step-*"):
        if path.name not in [f"step-{step}" for step in steps]:
            shutil.rmtree(path)
    return run / "checkpoints", [*straight[1], f"run.dir={run}"]


def names_in(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def test_resume_is_the_straight_run(crew: Any, straight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """As after a kill: rows of the steps that are repeated are written anew."""
    checkpoints, arguments = copy_of(straight, tmp_path, 2, 4)
    resumed = trained(crew(2), *arguments, "checkpoint.keep=2")
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing at step 4" in resumed.stdout
    found, expected = train_rows(tmp_path / "run"), train_rows(straight[0] / "run")
    assert [row["step"] for row in found] == list(range(1, 7))
    for key in ("loss", "samples", "tokens"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert found[4]["tokens_per_second"] != expected[4]["tokens_per_second"]  # it was computed again
    assert names_in(checkpoints) == ["step-4", "step-6"]


REFUSED = {
    "never": (["parallel.tensor=1", "resume=never"], ["resume=never", "run.dir"]),
    "network": (["parallel.tensor=1", "model.num_attention_heads=2"], ["num_attention_heads=4", "has 2"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(crew: Any, straight: tuple[Path, list[str]], what: str) -> None:
    _, arguments = straight
    change, words = REFUSED[what]
    process = trained(crew(1), *arguments, *change, "steps=9")
    assert process.returncode == 2
    assert all(word in process.stderr for word in words), process.stderr


def test_another_layout_and_learning_rate_go_on(crew: Any, straight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """What is configured now acts on the next step, and a table says what that is."""
    checkpoints, arguments = copy_of(straight, tmp_path, 4)
    changed = ["parallel.tensor=1", "zero.stage=0", "batch.micro=4", "optimizer.lr=1e-2", "schedule.name=constant"]
    process = trained(crew(1), *arguments, *changed, "stop_at=5")
    assert process.returncode == 0, process.stderr
    assert "continuing at step 4:" in process.stdout
    lines = process.stdout.splitlines()
    table = [line.split() for line in lines[lines.index("changed since the checkpoint:") + 1 :] if line[:2] == "  "]
    assert table == [
        ["then", "now"],
        ["batch.micro", "2", "4"],
        ["optimizer.lr", "0.0006", "0.01"],
        ["parallel.tensor", "2", "1"],
        ["processes", "2", "1"],
        ["run.dir", str(straight[0] / "run"), str(tmp_path / "run")],
        ["schedule.name", "linear", "constant"],
        ["zero.stage", "1", "0"],
    ]
    assert [row["lr"] for row in train_rows(tmp_path / "run")][-1] == 1e-2
    moved = largest_change(checkpoints)
    # Adam moves no weight by much more than the learning rate, and the linear schedule's was at 2e-4 by then
    assert 5e-3 < moved < 3e-2


def largest_change(checkpoints: Path) -> float:
    """Of any weight between steps 4 and 5."""
    before, after = (CheckpointReader(checkpoints / f"step-{step}") for step in (4, 5))
    changes = []
    for name, shape in before.shapes.items():
        shard = Shard(shape, 0, 0, 1, Constant(0), False)
        changes.append(float((after(name, shard) - before(name, shard)).abs().max()))
    return max(changes)


def test_another_tokenizer_is_refused(crew: Any, straight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Another text keeps the checkpoint's tokenizer; a tokenizer of other words cannot continue the run."""
    checkpoints, arguments = copy_of(straight, tmp_path, 4)
    other = "Wholly other words make wholly other tokens."
    save_tokenizer(train_tokenizer([other], 301), tmp_path / "other")
    arguments += ["parallel.tensor=1", f"data.cache={tmp_path / 'cache'}"]
    refused = trained(crew(1), *arguments, f"data.tokenizer={tmp_path / 'other'}")
    assert refused.returncode == 2
    assert "another tokenizer" in refused.stderr
    (tmp_path / "text.jsonl").write_text(f"{json.dumps({'text': other})}\n" * 40)
    again = trained(crew(1), *arguments, f"data.train={tmp_path / 'text.jsonl'}", "stop_at=5")
    assert again.returncode == 0, again.stderr
    assert "warning: the training text of train differs from the checkpoint's" in again.stdout
    before, kept = (checkpoints / f"step-{step}" / "tokenizer" / "tokenizer.json" for step in (4, 5))
    assert kept.read_bytes() == before.read_bytes()


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-99").mkdir()
    assert newest(tmp_path) is None
    with pytest.raises(UserError, match="neither a training checkpoint"):
        open_checkpoint(tmp_path / "step-99")


def test_going_back_sets_the_abandoned_branch_aside(
    crew: Any, straight: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """From an earlier checkpoint with a lower learning rate: the remedy for a divergence."""
    checkpoints, arguments = copy_of(straight, tmp_path, 2, 4, 6)
    changed = ["parallel.tensor=1", f"resume={checkpoints / 'step-2'}", "optimizer.lr=1e-5", "stop_at=4"]
    back = trained(crew(1), *arguments, *changed)
    assert back.returncode == 0, back.stderr
    assert names_in(checkpoints) == ["step-2", "step-4", "step-4.abandoned", "step-6.abandoned"]
    rows = train_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["lr"] < 1e-5  # what is configured now acts on the next step
    assert newest(checkpoints) == checkpoints / "step-4"  # from which the next start continues


def generated(checkpoint: str, tensor: int) -> str:
    """On the crew: what `generate` prints."""
    import opt_parallel.commands.generate as command

    words = ["--checkpoint", checkpoint, "--tensor", str(tensor), "--prompt", "Sentence 7", "--max-new-tokens", "12"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["generate", *words])
        command.main()
    return said.getvalue()


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.long)])
def test_generation_is_transformers_greedy_at_any_degree(
    crew: Any, straight: tuple[Path, list[str]], tmp_path: Path, ranks: int
) -> None:
    """On two ranks from the checkpoint, on one from its export."""
    from transformers import AutoTokenizer, OPTForCausalLM

    checkpoint = straight[0] / "run" / "checkpoints" / "step-4"
    output = tmp_path / "export"
    export(checkpoint, output, 10**9, ExportDtype.float32)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("Sentence 7", return_tensors="pt").input_ids
    theirs = OPTForCausalLM.from_pretrained(output)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    said = crew(ranks)(generated, str(checkpoint if ranks == 2 else output), ranks)
    assert said == [text + "\n"] + [""] * (ranks - 1)
