"""train.py and the scripts as a user starts them: real processes, their status and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# a run of seconds: opt-tiny on a made-up text, nothing sent anywhere
SMALL = [
    "model=opt-tiny", "precision=fp32", "data.sequence_length=16", "batch.global=4", "batch.micro=2", "steps=5",
    "logging.wandb=disabled", "logging.tensorboard=false", "schedule.warmup_steps=0",
]  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def write_text(folder: Path, documents: int = 60) -> Path:
    path = folder / "text.jsonl"
    rows = [
        {"text": f"Sentence {i} of the made-up text tells that {i} times {i} is {i * i}."} for i in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(folder: Path) -> list[str]:
    """The arguments of a small run whose files all lie under `folder`."""
    text = write_text(folder)
    return [*SMALL, f"data.train={text}", f"data.cache={folder / 'cache'}", f"run.dir={folder / 'run'}"]


def python(*arguments: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def torchrun(processes: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return python(*module, *arguments, timeout=timeout)


def train_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]
