"""evaluation.prompts: texts of a run's model, the same in any layout, and no change to the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import launch, small
from layouts import Layout, micro_batches, run_for, train
from training import trained

from opt_parallel.config.output import EvaluationConfig, LoggingConfig, Wandb
from opt_parallel.config.run import DataConfig, Run, RunConfig
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.runtime.clock import Clock

PROMPTS = ["Sentence 7", "The made-up text tells that"]
SAMPLING = [f"evaluation.prompts={json.dumps(PROMPTS)}", "evaluation.every=2", "evaluation.max_new_tokens=8"]


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_under_zero_3_writes_its_samples(tmp_path: Path) -> None:
    """With validation, and gathering every weight anew."""
    zero = ["zero.stage=3", "zero.persistence_threshold=0", "zero.prefetch_bucket_size=10000"]
    arguments = [*small(tmp_path), *zero, *SAMPLING, f"data.validation={tmp_path / 'text.jsonl'}"]
    process = launch(2, "train.py", *arguments)
    assert process.returncode == 0, process.stderr
    rows = samples_of(tmp_path / "run")
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, text) for step in (2, 4, 5) for text in PROMPTS]
    assert len({row["text"] for row in rows}) == len(rows)  # other draws at each step
    assert f"sample at step 2: {PROMPTS[0] + rows[0]['text']!r}" in process.stdout
    assert process.stdout.count("sample at") == process.stdout.count("validation at") == 3


def sampled_while_training(run: Run, folder: str) -> tuple[list[str], list[float]]:
    """On the crew: texts before and between steps, and the steps' losses."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.validation import Prompts

    prompts = Prompts.encode(run, Path(folder))
    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        texts, losses = prompts.texts(engine, 0), []
        for step in range(2):
            result = engine.step(micro_batches(run, step, topology.data.rank, topology.data.size), Clock(step))
            losses.append(float(result.loss))
            texts += prompts.texts(engine, step + 1)
        engine.close()
    return texts, losses


def with_prompts(run: Run) -> Run:
    fields = {name: getattr(run, name) for name in run.__dataclass_fields__}
    return Run(**{**fields, "evaluation": EvaluationConfig(every=1, prompts=PROMPTS, max_new_tokens=3)})


def run_in(layout: Layout) -> Run:
    return run_for(layout, {"num_hidden_layers": 1, "vocab_size": 301}, steps=2)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    save_tokenizer(train_tokenizer(["Some text to train on."], 300), tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=2, stage=3, micro=4),
        Layout(tensor=2, stage=1, micro=4),
        pytest.param(Layout(tensor=2, data=2, stage=3, micro=4), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_same_texts_in_any_layout_and_the_same_run_as_without(crew: Any, tokenizer: str, layout: Layout) -> None:
    plain = run_in(Layout(micro=4))
    ((texts, losses),) = crew(1)(sampled_while_training, with_prompts(plain), tokenizer)
    assert len(texts) == 6
    assert losses == crew(1)(train, plain)[0][0]
    for others, other_losses in crew(layout.world)(sampled_while_training, with_prompts(run_in(layout)), tokenizer):
        assert others == texts
        assert other_losses == pytest.approx(losses, rel=2e-6)  # float32 sums in another order


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_half_precision_under_zero_3(crew: Any, tokenizer: str, precision: str) -> None:
    run = run_in(Layout(data=2, stage=3, micro=4, precision=precision))
    (texts, losses), other = crew(2)(sampled_while_training, with_prompts(run), tokenizer)
    assert (texts, losses) == other
    assert len(texts) == 6
    assert losses == crew(2)(train, run)[0][0]


def test_a_prompt_without_room_is_one_line_before_anything_starts(crew: Any, tmp_path: Path) -> None:
    long = "Sentence " * 60
    process = trained(crew(1), *small(tmp_path), *SAMPLING, "data.held_out=0", f'evaluation.prompts=["{long}"]')
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: evaluation.prompts: 'Sentence ")
    assert "128 positions" in line
    assert "starting" not in process.stdout


def test_rows_after_the_resumed_step_are_taken_back_and_trackers_get_the_texts(tmp_path: Path) -> None:
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from opt_parallel.report.metrics import Metrics

    run = Run(
        run=RunConfig(name="demo", dir=str(tmp_path)),
        data=DataConfig(sequence_length=16),
        evaluation=EvaluationConfig(every=1, prompts=PROMPTS),
        logging=LoggingConfig(wandb=Wandb.disabled),
    )

    def record(first: int, last: int, word: str) -> None:
        metrics = Metrics.open(run, 1, True, torch.device("cpu"), Clock(first, 8, 8))
        for step in range(first + 1, last + 1):
            metrics.samples(Clock(step, 8, 8), [f" {word} {step}", " ü\n"])
        metrics.abandon()

    record(0, 3, "old")
    record(2, 4, "new")
    assert [row["text"] for row in samples_of(tmp_path)][::2] == [" old 1", " old 2", " new 3", " new 4"]
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    texts = events.Tensors("samples/1/text_summary")
    assert [event.tensor_proto.string_val[0].decode() for event in texts if event.step == 4] == ["Sentence 7 new 4"]
    record(0, 1, "fresh")
    assert [row["text"] for row in samples_of(tmp_path)][::2] == [" fresh 1"]
