"""Who is missing when a collective fails, and who says so: on the crew, and in runs whose ranks are stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, environment, small

HOSTS = ("a", "a", "b", "b")


def call(name: str, deaf: list[int], fail: list[int]) -> tuple[str, bool] | None:
    """On the crew: what each rank learns. Ranks of `deaf` do not answer, as if stopped; ranks of `fail` ask; the others
    are busy in the package."""
    import torch.distributed as dist

    from opt_parallel.parallel import roll_call
    from opt_parallel.parallel.topology import store_of

    roll_call.POLL, roll_call.ANSWER_TIMEOUT = 0.1, 1.0
    rank = dist.get_rank()
    if rank in deaf:
        return None
    calls = roll_call.RollCall(store_of(name), rank, HOSTS)
    try:
        if rank in fail:
            return calls.ask()
        for _ in range(4):
            calls._wait(lambda: False)  # a second
        return None
    finally:
        calls.close()


def test_who_does_not_answer_is_named_by_one_rank_of_each_host(crew: Any) -> None:
    said = crew(4)(call, "stopped", [0], [1, 2, 3])
    assert said == [None, ("no answer from a, rank 0", True), ("no answer from a, rank 0", True), ("", False)]


def test_one_that_only_waits_for_others_counts_as_alive(crew: Any) -> None:
    """Rank 3 is gone, and of the others rank 0 waits in another collective."""
    said = crew(4)(call, "gone", [3], [1, 2])
    assert said == [None, ("no answer from b, rank 3", True), ("no answer from b, rank 3", True), None]


def test_one_that_answers_and_does_not_fail_tells_where_it_is(crew: Any) -> None:
    said = crew(4)(call, "busy", [], [0, 1, 3])
    line, speaks = said[0]
    assert speaks
    assert re.fullmatch(r"b, rank 2 is still at parallel/roll_call.py, line \d+", line)
    assert [answer and answer[1] for answer in said] == [True, False, None, True]


def test_where_all_fail_nobody_is_named(crew: Any) -> None:
    said = crew(4)(call, "all", [], [0, 1, 2, 3])
    assert [answer[1] for answer in said] == [True, False, True, False]
    assert said[0][0] == said[2][0] == "all ranks answer"


@pytest.mark.long
@pytest.mark.parametrize("kept_by", ["launcher", "rank 0"])
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named(tmp_path: Path, stopped: int, kept_by: str) -> None:
    """Also the rank whose process hosts the ranks' store."""
    arguments = [*small(tmp_path), "steps=20000", "parallel.timeout=5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(int(kept_by == "rank 0")))
    with subprocess.Popen([*command, *arguments], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL) as process:  # fmt: skip
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.05)
        header = (tmp_path / "run" / "logs" / f"rank-{stopped:05d}.log").read_text().partition("\n")[0]
        os.kill(int(header.rpartition("process ")[2]), signal.SIGSTOP)
        _, errors = process.communicate(timeout=100)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert f", rank {1 - stopped}: another rank is gone" in lines[0]
    assert re.search(rf"\): no answer from .*, rank {stopped}; the same command resumes", lines[0])
