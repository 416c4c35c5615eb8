"""Runs train.py and the scripts in real processes, as a user does, and returns their status and output."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from fork_server import Forked, ForkServer

ROOT = Path(__file__).parents[2]
# the environment variable with the socket of the fork server that the workers of `make test` share
SHARED_SERVER = "OPT_PARALLEL_FORK_SERVER"
# Settings of a run of a few seconds, which trains opt-tiny on synthetic text without trackers.
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
    """The command-line arguments of a small run with all files under `folder`."""
    text = write_text(folder)
    return [*SMALL, f"data.train={text}", f"data.cache={folder / 'cache'}", f"run.dir={folder / 'run'}"]


def python(*arguments: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command.

    A file is run in a fork of the fork server. Any other command, or a command with its own environment variables, is
    run in a new interpreter."""
    if arguments[0].endswith(".py") and not env:
        return launch(1, *arguments, timeout=timeout)
    return cold_python(*arguments, timeout=timeout, **env)


def cold_python(*arguments: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def torchrun(processes: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return cold_python(*module, *arguments, timeout=timeout)


def launch(processes: int, *arguments: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command on several forked ranks with the environment variables that a launcher sets.

    If a rank fails, all ranks are ended with SIGTERM, as a launcher does. The result has the failed rank's status."""
    server = fork_server(env["LD_PRELOAD"]) if "LD_PRELOAD" in env else fork_server()
    with socket.socket() as free, TemporaryFile() as out, TemporaryFile() as err:
        free.bind(("127.0.0.1", 0))
        common = environment(**env)
        if processes > 1:
            common |= {
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
            }  # fmt: skip
        free.close()
        ranks = [
            server.start(
                list(arguments), ROOT, common | ({"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {}),
                out.fileno(), err.fileno(),
            )
            for i in range(processes)
        ]  # fmt: skip
        status = _wait_for_all(ranks, timeout, [sys.executable, *arguments])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([sys.executable, *arguments], status, *texts)


def start(output: Path, *arguments: str, **env: str) -> Forked:
    """Start a Python file in the background, in a fork that leads a process group. Its output goes to `output`."""
    with output.open("wb") as file:
        return fork_server().start(list(arguments), ROOT, environment(**env), file.fileno(), file.fileno())


def _wait_for_all(ranks: list[Forked], timeout: float, command: list[str]) -> int:
    waiting, status, deadline = list(ranks), 0, time.monotonic() + timeout
    while waiting:
        if time.monotonic() > deadline:
            for rank in waiting:
                rank.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        for rank in [rank for rank in waiting if rank.ended_within(0.02)]:
            waiting.remove(rank)
            if rank.status and not status:
                status = rank.status
                for other in waiting:
                    os.kill(other.pid, signal.SIGTERM)
    return status


@functools.cache
def fork_server(preloaded: str = "") -> ForkServer:
    """The fork server, started if necessary. `preloaded` is an LD_PRELOAD library, which a fork cannot load later."""
    if SHARED_SERVER in os.environ and not preloaded:
        return ForkServer(os.environ[SHARED_SERVER])
    return ForkServer.started(environment(LD_PRELOAD=preloaded))


def train_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]
