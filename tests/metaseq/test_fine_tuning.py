"""Training from Meta's files is training from their conversion, and LoRA keeps the base as it is in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import launch, python, train_rows
from finetuning import some_records, tokenizer
from layouts import Layout
from metaseq_forms import Size, weights_of, write
from metaseq_runs import run_from, train_from

from opt_parallel.config.output import ExportDtype
from opt_parallel.data.encode.tokenizer import save_tokenizer
from opt_parallel.tools.export import export

SIZE = Size(hidden=64, heads=4, ffn=256, rows=304, positions=64)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write("raw", folder / "raw", SIZE, weights_of(SIZE), parts=2, shards=3)
    export(folder / "raw", folder / "hf", 10**9, ExportDtype.auto)
    return folder


def test_training_from_shards_is_training_from_their_conversion(crew: Any, shards: Path) -> None:
    layout = Layout(tensor=2, stage=1)
    ours, theirs = (crew(2)(train_from, run_from(shards / name, layout)) for name in ("raw", "hf"))
    assert ours[0]["losses"] == theirs[0]["losses"]
    assert ours[0]["losses"][0] != ours[0]["losses"][1]
    model = sum(values.nbytes for values in weights_of(SIZE).values())
    assert all(model / 2 < each["read"] < 0.6 * model for each in ours)


def test_the_frozen_base_has_no_fp32_copy_and_no_gradient(crew: Any, shards: Path) -> None:
    import torch

    layout = Layout(tensor=2, stage=1, recompute="full", precision="bf16")
    for each in crew(2)(train_from, run_from(shards / "raw", layout, rank=1)):
        assert each["dtypes"] == {torch.bfloat16}
        assert each["gradients"] == 0
        # All trained weights of a rank are fewer than the smallest matrix of the base, so no storage is such a copy.
        assert each["fp32"] < each["smallest"] < each["frozen"]


@pytest.mark.long
def test_commands_from_shards_to_a_fine_tuned_model(shards: Path, tmp_path: Path) -> None:
    """The documented commands, on two ranks. The losses equal those of a run from the converted folder."""
    save_tokenizer(tokenizer(), tmp_path / "tokenizer")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(record) + "\n" for record in some_records(40)))
    shown = python("scripts/checkpoint.py", "show", str(shards / "raw"))
    assert "2 model parts of 3 FSDP shards each, flat tensors with shard_metadata" in shown.stdout
    verified = python("scripts/verify.py", "--checkpoint", str(shards / "raw"))
    assert (verified.returncode, "is complete" in verified.stdout) == (0, True)
    losses = []
    for name, lora in (("raw", 0), ("hf", 0), ("raw", 2)):
        done = launch(
            2, "train.py", f"init_from={shards / name}", f"data.tokenizer={tmp_path / 'tokenizer'}", "task=finetune",
            f"task.lora.rank={lora}", "parallel.tensor=2", f"precision={'bf16' if lora else 'fp32'}",
            "activation_checkpointing=full", "batch.global=4", "batch.micro=2", "data.sequence_length=32", "steps=2",
            f"data.train={pairs}", "data.bad_records=skip", f"data.cache={tmp_path / 'cache'}",
            f"run.dir={tmp_path / f'{name}-{lora}'}",
            "schedule.warmup_steps=0", "logging.wandb=disabled", "logging.tensorboard=false",
            f"export.at_end={'true' if lora else 'false'}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in train_rows(tmp_path / f"{name}-{lora}")])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    for folder in ("export", "checkpoints/step-2"):
        checkpoint = str(tmp_path / "raw-2" / folder)
        arguments = ("--checkpoint", checkpoint, "--prompt", "the cat", "--max-new-tokens", "4")
        written = python("scripts/generate.py", *arguments)
        assert written.returncode == 0, written.stderr
