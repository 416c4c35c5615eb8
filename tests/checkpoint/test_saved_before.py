"""A checkpoint, a token store and an export of an earlier version (saved_before/) are read as they were.

An earlier version wrote them with the settings below. expected.json has the losses of that run to its end. `checkpoint`
has format 1. `checkpoint-2` is the same state in format 2, saved by two ranks with ZeRO-3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import train_rows
from training import trained

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.data.encode.tokenizer import load_tokenizer
from opt_parallel.data.store.store import TokenStore
from opt_parallel.parallel.topology import ALONE
from opt_parallel.tools.verify import verify

BEFORE = Path(__file__).parents[1] / "saved_before"
SETTINGS = [
    "model=opt-tiny", "model.hidden_size=16", "model.num_attention_heads=2", "model.ffn_dim=32",
    "model.max_position_embeddings=32", "precision=fp32", "data.sequence_length=16", "batch.global=4", "batch.micro=2",
    "steps=6", "schedule.warmup_steps=0", "optimizer.lr=1e-2", "logging.wandb=disabled", "logging.tensorboard=false",
    "run.name=before",
]  # fmt: skip


@pytest.mark.parametrize("saved", ["checkpoint", "checkpoint-2"])
def test_a_checkpoint_resumes_and_gives_the_export(crew: Any, tmp_path: Path, saved: str) -> None:
    shutil.copytree(BEFORE / saved, tmp_path / "run" / "checkpoints" / "step-4")
    places = [f"data.train={BEFORE / 'text.jsonl'}", f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]
    process = trained(crew(1), *SETTINGS, *places)
    assert process.returncode == 0, process.stderr
    expected = json.loads((BEFORE / "expected.json").read_text())
    rows = train_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [5, 6]
    for row in rows:  # written on one kind of CPU, read on any: rounding of float32 sums may differ
        assert row["loss"] == pytest.approx(expected["losses"][str(row["step"])], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norms"][str(row["step"])], rel=1e-5)
    ids = torch.arange(4, 20).unsqueeze(0)
    logits = [
        open_checkpoint(folder).model(ALONE, torch.device("cpu"), torch.float32)(ids)
        for folder in (tmp_path / "run" / "checkpoints" / "step-6", BEFORE / "export")
    ]
    assert torch.allclose(*logits, rtol=0, atol=1e-5)


def test_a_store_holds_the_text() -> None:
    store, tokenizer = TokenStore(BEFORE / "store"), load_tokenizer(BEFORE / "checkpoint" / "tokenizer")
    texts = [json.loads(line)["text"] for line in (BEFORE / "text.jsonl").read_text().splitlines()]
    ids = [[*tokenizer.encode(text, add_special_tokens=False).ids, 2] for text in texts]
    assert (store.documents, store.tokens) == (len(texts), sum(map(len, ids)))
    assert np.array_equal(store.of_tokens("ids", 0, store.tokens), np.concatenate(ids))


def test_an_export_is_verified() -> None:
    verdict = verify(BEFORE / "export")
    assert verdict is not None
    assert verdict.agrees, verdict
