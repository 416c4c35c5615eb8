"""Saved and resumed: the straight run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import launch, small, train_rows
from training import trained

from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.checkpoint.store import newest
from opt_parallel.config.output import ExportDtype
from opt_parallel.parallel.shard import Constant, Shard
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export

RUN = [
    "parallel.tensor=2",
    "zero.stage=1",
    "model.layerdrop=0.2",
    "steps=6",
    "checkpoint.every=2",
    "model.vocab_size=301",
]


@pytest.fixture(scope="module")
def stopped(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run at tensor 2 that was stopped at step 4 of 6, and its arguments."""
    folder = tmp_path_factory.mktemp("stopped")
    arguments = [*small(folder), *RUN]
    process = trained(crew(2), *arguments, "stop_at=4")
    assert process.returncode == 0, process.stderr
    return folder, arguments


def test_resume_is_the_straight_run(crew: Any, stopped: tuple[Path, list[str]]) -> None:
    folder, arguments = stopped
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert trained(crew(2), *arguments, f"run.dir={folder / 'straight'}").returncode == 0
    resumed = trained(crew(2), *arguments)
    assert resumed.returncode == 0
    assert "continuing at step 4" in resumed.stdout
    assert [(row["step"], row["loss"], row["samples"], row["tokens"]) for row in train_rows(folder / "run")] == [
        (row["step"], row["loss"], row["samples"], row["tokens"]) for row in train_rows(folder / "straight")
    ]
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == ["step-4", "step-6"]  # keep=2


REFUSED = {
    "never": (["parallel.tensor=1", "resume=never"], ["resume=never", "run.dir"]),
    "network": (["parallel.tensor=1", "model.num_attention_heads=2"], ["num_attention_heads=4", "has 2"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(crew: Any, stopped: tuple[Path, list[str]], what: str) -> None:
    _, arguments = stopped
    change, words = REFUSED[what]
    process = trained(crew(1), *arguments, *change, "steps=9")
    assert process.returncode == 2
    assert all(word in process.stderr for word in words), process.stderr


def test_another_layout_and_learning_rate_go_on(crew: Any, stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    """What is configured now acts on the next step, and a table says what that is."""
    folder, arguments = stopped
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "run" / "checkpoints" / "step-4", checkpoints / "step-4")
    changed = ["parallel.tensor=1", "zero.stage=0", "batch.micro=4", "optimizer.lr=1e-2", "schedule.name=constant"]
    process = trained(crew(1), *arguments, *changed, f"run.dir={tmp_path / 'run'}", "stop_at=5")
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
        ["run.dir", str(folder / "run"), str(tmp_path / "run")],
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


def test_another_tokenizer_is_refused(crew: Any, tmp_path: Path) -> None:
    """Another text keeps the checkpoint's tokenizer; a tokenizer of other words cannot continue the run."""
    arguments = [*small(tmp_path), "steps=2"]
    assert trained(crew(1), *arguments).returncode == 0
    (tmp_path / "text.jsonl").write_text('{"text": "Wholly other words make wholly other tokens."}\n' * 40)
    elsewhere = [*arguments, f"run.dir={tmp_path / 'other'}"]
    assert trained(crew(1), *elsewhere).returncode == 0
    tokenizers = [tmp_path / run / "checkpoints" / "step-2" / "tokenizer" for run in ("run", "other")]
    refused = trained(crew(1), *arguments, "steps=4", f"data.tokenizer={tokenizers[1]}")
    assert refused.returncode == 2
    assert "another tokenizer" in refused.stderr
    again = trained(crew(1), *arguments, "steps=4")
    assert again.returncode == 0, again.stderr
    assert "warning: the training text of train differs from the checkpoint's" in again.stdout
    kept = tmp_path / "run" / "checkpoints" / "step-4" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (tokenizers[0] / "tokenizer.json").read_bytes()


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-99").mkdir()
    assert newest(tmp_path) is None
    with pytest.raises(UserError, match="neither a training checkpoint"):
        open_checkpoint(tmp_path / "step-99")


def test_going_back_sets_the_abandoned_branch_aside(crew: Any, tmp_path: Path) -> None:
    """From an earlier checkpoint with a lower learning rate: the remedy for a divergence."""
    arguments = [*small(tmp_path), "steps=4", "checkpoint.every=1", "checkpoint.keep=3"]
    assert trained(crew(1), *arguments).returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    back = trained(crew(1), *arguments, f"resume={checkpoints / 'step-2'}", "optimizer.lr=1e-5", "stop_at=3")
    assert back.returncode == 0, back.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-2",
        "step-3",
        "step-3.abandoned",
        "step-4.abandoned",
    ]
    rows = train_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["lr"] < 1e-5  # what is configured now acts on the next step
    again = trained(crew(1), *arguments, "optimizer.lr=1e-5")
    assert "continuing at step 3" in again.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.long)])
def test_generation_is_transformers_greedy_at_any_degree(
    stopped: tuple[Path, list[str]], tmp_path: Path, ranks: int
) -> None:
    """On two ranks from the checkpoint, on one from its export."""
    from transformers import AutoTokenizer, OPTForCausalLM

    checkpoint = stopped[0] / "run" / "checkpoints" / "step-4"
    output = tmp_path / "export"
    export(checkpoint, output, 10**9, ExportDtype.float32)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("Sentence 7", return_tensors="pt").input_ids
    theirs = OPTForCausalLM.from_pretrained(output)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    source = ["--checkpoint", str(checkpoint if ranks == 2 else output), "--tensor", str(ranks)]
    ours = launch(ranks, "scripts/generate.py", "--prompt", "Sentence 7", "--max-new-tokens", "12", *source)
    assert ours.stdout == text + "\n", ours.stderr
