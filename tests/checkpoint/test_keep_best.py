"""checkpoint.keep_best: the checkpoint with the lowest validation loss is saved, named, and never forgotten."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from command import small
from layouts import Layout, run_for
from training import trained

from opt_parallel.checkpoint.folders import best_in, renew_best, write_best
from opt_parallel.config.data import DataConfig
from opt_parallel.config.output import CheckpointConfig, EvaluationConfig
from opt_parallel.config.run import Run, RunConfig
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.checked import dump_checked
from opt_parallel.tools.inspect import listed


def run_in(folder: Path, resume: str = "auto") -> Run:
    run = run_for(Layout(data=2, stage=1), {"num_hidden_layers": 1, "vocab_size": 300})
    if not (folder / "tokenizer").exists():
        save_tokenizer(train_tokenizer(["some text"], 300), folder / "tokenizer")
    return dataclasses.replace(
        run,
        run=RunConfig("best", str(folder)),
        checkpoint=CheckpointConfig(keep=1, keep_best=True),
        evaluation=EvaluationConfig(every=1),
        data=DataConfig(validation="text", sequence_length=16),
        resume=resume,
    )


def saved(run: Run, losses: list[float]) -> tuple[int, list[bool]]:
    """On the crew: go on from where the run stands, a checkpoint after each step, whose validation losses these are.
    Where it stood, and which were the best so far."""
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.clock import Clock
    from opt_parallel.start import build_engine

    folder = run.folder
    with Topology.open(run.parallel.tensor) as topology:
        store = Store(run, topology, folder / "tokenizer")
        checkpoint = store.find()
        engine = build_engine(run, topology, store, checkpoint)
        clock = checkpoint.clock if checkpoint else Clock()
        began, were_best = clock.step, []
        for loss in losses:
            clock = clock.after(8, 128)
            best = store.if_best(loss)
            were_best.append(best is not None)
            store.save(engine, clock, best)
            if topology.is_main:
                note(folder / "metrics.jsonl", clock.step, loss)
        store.finish()
        engine.close()
    return began, were_best


def note(path: Path, step: int, loss: float) -> None:
    """As metrics does: what comes later is taken back."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    row = {"kind": "validation", "step": step, "loss": loss if math.isfinite(loss) else None}
    path.write_text("".join(f"{line}\n" for line in [*kept, json.dumps(row)]))


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def best_of(folder: Path) -> dict[str, Any]:
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    return {key: best[key] for key in ("step", "loss")}


def test_the_best_stays_through_resuming_and_going_back(crew: Any, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    answers = crew(2)(saved, run, [float("nan"), 2.0, 2.5, 2.5])
    assert answers == [(0, [False, True, False, False])] * 2
    assert steps_of(tmp_path) == ["step-2", "step-4"]
    assert best_of(tmp_path) == {"step": 2, "loss": 2.0}
    assert crew(2)(saved, run, [2.25, 1.5, 1.75]) == [(4, [False, True, False])] * 2
    assert steps_of(tmp_path) == ["step-6", "step-7"]
    assert best_of(tmp_path) == {"step": 6, "loss": 1.5}
    assert [each.state for each in listed(tmp_path)] == ["complete, the best", "complete"]
    # back before what was best: the best of what is left, by the run's own metrics
    back = run_in(tmp_path, resume=str(tmp_path / "checkpoints" / "step-6"))
    assert crew(2)(saved, back, [1.25, 9.0]) == [(6, [True, False])] * 2
    assert steps_of(tmp_path) == ["step-7", "step-7.abandoned", "step-8"]
    assert best_of(tmp_path) == {"step": 7, "loss": 1.25}
    kept = dataclasses.replace(run, checkpoint=CheckpointConfig(keep=5, keep_best=True))
    assert crew(2)(saved, kept, [1.0, 5.0]) == [(8, [True, False])] * 2
    further_back = dataclasses.replace(kept, resume=str(tmp_path / "checkpoints" / "step-8"))
    assert crew(2)(saved, further_back, [1.3]) == [(8, [False])] * 2  # step 7 is the best again
    assert best_of(tmp_path) == {"step": 7, "loss": 1.25}


def test_a_best_that_was_not_named_before_the_kill_is_found(crew: Any, tmp_path: Path) -> None:
    """Killed between the checkpoint's name and best.json, which names none yet or the one before."""
    run = run_in(tmp_path)
    for first, losses in (([2.0], [2.5, 2.5]), ([1.5], [2.5])):
        before = tmp_path / "checkpoints" / "best.json"
        old = before.read_bytes() if before.exists() else None
        crew(2)(saved, run, first)
        best = best_of(tmp_path)
        if old is None:
            before.unlink()
        else:
            before.write_bytes(old)
        assert crew(2)(saved, run, losses)[0][1] == [False] * len(losses)
        assert best_of(tmp_path) == best
        assert f"step-{best['step']}" in steps_of(tmp_path)


def test_a_run_keeps_its_best_besides_the_newest(crew: Any, tmp_path: Path) -> None:
    """Held-out text that is the training text backwards, so that learning the one spoils the other."""
    arguments = small(tmp_path)
    backwards = json.loads((tmp_path / "text.jsonl").read_text().splitlines()[0])["text"][::-1] * 2
    (tmp_path / "held.txt").write_text(backwards)
    arguments += [
        f"data.validation={tmp_path / 'held.txt'}", "evaluation.every=1", "steps=4", "checkpoint.keep=1",
        "checkpoint.keep_best=true", "optimizer.lr=1e-2", "schedule.name=constant",
    ]  # fmt: skip
    process = trained(crew(1), *arguments)
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "validation"}
    lowest = min(losses, key=lambda step: losses[step])
    assert lowest < 4, losses
    assert best_of(tmp_path / "run") == {"step": lowest, "loss": losses[lowest]}
    assert steps_of(tmp_path / "run") == [f"step-{lowest}", "step-4"]


@pytest.mark.parametrize("every", [0, 2])
def test_it_needs_a_validation(every: int) -> None:
    evaluation = EvaluationConfig(every=every, prompts=["Once"] if every else [])
    with pytest.raises(UserError, match=f"keep_best=true needs a validation loss, but evaluation.every={every}"):
        Run(checkpoint=CheckpointConfig(keep_best=True), evaluation=evaluation, data=DataConfig(held_out=0))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Of a run whose best is step 4, by its metrics and by best.json."""
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 5):
        (folder / f"step-{step}").mkdir(parents=True)
        (folder / f"step-{step}" / "manifest.json").touch()
    rows = [{"kind": "validation", "step": step, "loss": loss} for step, loss in ((1, 0.5), (2, 2.5), (4, 1.25))]
    rows.append({"kind": "train", "step": 5, "loss": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(dump_checked(row) + "\n" for row in rows))
    write_best(folder, 4, 1.25)
    return folder


def test_every_flipped_bit_of_best_json_is_seen_or_without_effect(checkpoints: Path) -> None:
    path = checkpoints / "best.json"
    content = bytearray(path.read_bytes())
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert best_in(checkpoints) == {"step": 4, "loss": 1.25}, bytes(content)
        content[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000, b'{"step": "4", "loss": 1.0}', bytes(99),
        b'{"step": 4, "loss": NaN}', b'{"step": 4, "loss": 1e999}', b'{"step": 1e999, "loss": 1.0}',
        b'{"step": true, "loss": 1.0}', b'{"step": 3, "loss": 1.0}', b'{"step": 4, "loss": null}', b'{"step": 4}',
        b'{"step": ' + b"4" * 5000 + b', "loss": 1.0}', b'{"step": -4, "loss": 1.0}', b" " * 10**6 + b"{}",
        b'{"step": 4, "step": 5, "loss": 1.0}',
    ],
)  # fmt: skip
def test_whatever_best_json_holds_the_metrics_tell(checkpoints: Path, content: bytes) -> None:
    (checkpoints / "best.json").write_bytes(content)
    assert best_in(checkpoints) == {"step": 4, "loss": 1.25}
    renew_best(checkpoints)
    assert best_of(checkpoints.parent) == {"step": 4, "loss": 1.25}


def test_best_json_that_is_no_file_is_not_read(checkpoints: Path) -> None:
    path = checkpoints / "best.json"
    path.unlink()
    assert best_in(checkpoints) is None
    os.mkfifo(path)
    assert best_in(checkpoints) == {"step": 4, "loss": 1.25}
    path.unlink()
    path.symlink_to("/dev/zero")
    assert best_in(checkpoints) == {"step": 4, "loss": 1.25}
    path.unlink()
    path.mkdir()
    assert best_in(checkpoints) == {"step": 4, "loss": 1.25}
