"""What a configuration refuses, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import python
from composing import quick_run_of, run_of
from omegaconf import OmegaConf

from opt_parallel.config.compose import run_from, to_dict, to_yaml
from opt_parallel.config.model import Activation, ModelConfig
from opt_parallel.config.output import EvaluationConfig, ExportConfig
from opt_parallel.config.run import (
    DataConfig,
    Offload,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    PrecisionConfig,
    Run,
    ScheduleConfig,
    StateDtype,
    ZeroConfig,
)
from opt_parallel.config.task import LoraConfig, Task, TaskConfig
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError


def bf16_state(**settings: Any) -> Run:
    return Run(optimizer=OptimizerConfig(state_dtype=StateDtype.bf16), **settings)


REFUSED: list[tuple[Any, list[str]]] = [
    (lambda: ModelConfig(hidden_size=100, num_attention_heads=12), ["100", "12", "100 = 12 × 8 + 4"]),
    (lambda: ModelConfig(dropout=1.0), ["model.dropout=1.0"]),
    (lambda: ModelConfig(pad_token_id=50272), ["pad_token_id=50272", "50271"]),
    (lambda: ModelConfig(num_hidden_layers=0), ["num_hidden_layers=0"]),
    (lambda: Run(parallel=ParallelConfig(tensor=8)), ["num_attention_heads=12", "tensor=8", "12 = 8 × 1 + 4"]),
    (lambda: Run(parallel=ParallelConfig(tensor=0)), ["parallel.tensor=0"]),
    (lambda: Run(model=ModelConfig(ffn_dim=3073), parallel=ParallelConfig(tensor=2)), ["ffn_dim=3073", "tensor=2"]),
    (lambda: Run(data=DataConfig(sequence_length=2049)), ["2049", "2048"]),
    (lambda: Run(model=ModelConfig(vocab_size=5), parallel=ParallelConfig(tensor=4)), ["vocab_size=5", "tensor=4"]),
    (lambda: ZeroConfig(stage=0, offload=Offload.cpu), ["zero.offload=cpu", "zero.stage=0"]),
    (lambda: ZeroConfig(stage=4), ["zero.stage=4"]),
    (
        lambda: Run(zero=ZeroConfig(stage=0), precision=PrecisionConfig(Precision.bf16)),
        ["precision=bf16", "zero.stage=0"],
    ),
    (lambda: Run(batch={"global": 0, "micro": 1}), ["batch.global=0"]),
    (lambda: Run(batch={"global": 8, "micro": 1, "nano": 2}), ["global, micro, nano"]),
    (lambda: Run(batch={"global": 8}), ["batch has global"]),
    (lambda: Run(steps=0), ["steps=0"]),
    (
        lambda: Run(task=TaskConfig(name=Task.finetune), data=DataConfig(train="text", stream=True)),
        ["task=finetune needs all examples", "set stream to false"],
    ),
    (lambda: Run(task=TaskConfig(lora=LoraConfig(rank=8))), ["task.lora.rank=8", "set init_from=…"]),
    (lambda: ScheduleConfig(warmup_steps=1, warmup_tokens=1), ["warmup_steps=1", "warmup_tokens=1"]),
    (lambda: Run(steps=10, schedule=ScheduleConfig(warmup_steps=11)), ["11", "steps=10"]),
    (
        lambda: Run(evaluation=EvaluationConfig(every=5), data=DataConfig(held_out=0)),
        ["evaluation.every=5", "data.validation"],
    ),
    (lambda: EvaluationConfig(prompts=["Once"]), ["evaluation.prompts=['Once']", "evaluation.every=0"]),
    (lambda: EvaluationConfig(max_new_tokens=0), ["evaluation.max_new_tokens=0"]),
    (lambda: OptimizerConfig(betas=[0.9]), ["betas=[0.9]"]),
    (lambda: OptimizerConfig(lr=0.0), ["lr=0.0"]),
    (lambda: bf16_state(precision=PrecisionConfig(Precision.fp16)), ["precision=fp16", "optimizer.state_dtype=fp32"]),
    (lambda: bf16_state().in_precision(Precision.fp32), ["precision=fp32", "use precision=bf16"]),
    (lambda: bf16_state(zero=ZeroConfig(stage=0)), ["zero.stage=0", "zero.stage=1, 2 or 3"]),
    (lambda: bf16_state(zero=ZeroConfig(offload=Offload.cpu)), ["zero.offload=cpu", "use zero.offload=none"]),
    (lambda: PrecisionConfig(initial_scale=1e-3), ["initial_scale=0.001", "floor=0.03125"]),
    (lambda: DataConfig(train=3), ["data.train=3"]),
    (lambda: ExportConfig(max_shard_size="5 apples"), ["export.max_shard_size=5 apples", "5GB"]),
    (
        lambda: Run(batch={"global": 6, "micro": 2}).check_world(2),
        ["batch.global=6", "micro(2) × data(2) = 4", "4 or 8"],
    ),
    (lambda: Run(parallel=ParallelConfig(tensor=3)).check_world(8), ["data(2) × tensor(3) ≠ world size 8"]),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_refused_in_one_line_that_names_the_values(make: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_sealed_once_made() -> None:
    run = Run()
    with pytest.raises(AttributeError, match="immutable"):
        run.steps = 5
    with pytest.raises(AttributeError, match="immutable"):
        run.model.dropout = 0.0


def test_survives_the_way_to_yaml_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths that exist here, such as `cache`, would become absolute
    run = Run(model=ModelConfig(activation_function=Activation.silu), precision=PrecisionConfig(name=Precision.fp16))
    again = run_from(OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.create(to_yaml(run))))
    assert again == run
    assert to_dict(run)["model"]["activation_function"] == "silu"


def test_warmup_in_tokens_is_rounded_up_to_whole_steps() -> None:
    run = Run(schedule=ScheduleConfig(warmup_tokens=8 * 2048 * 3 + 1))
    assert run.schedule.warmup_at(run.batch_tokens) == 4


def test_a_warmup_in_tokens_must_end_within_what_is_left() -> None:
    """Which depends on the batches so far: a run that goes on with a small batch may have it behind it."""
    run = Run(steps=10, schedule=ScheduleConfig(warmup_tokens=8 * 2048 * 12))
    with pytest.raises(
        UserError, match=r"schedule.warmup_tokens=196,608 .* steps=10, .* 16,384 tokens a step: shorten"
    ):
        run.check_warmup(Clock())
    run.check_warmup(Clock(4, 48, 8 * 2048 * 6))
    with pytest.raises(UserError, match="98,303 tokens at step 4"):
        run.check_warmup(Clock(4, 48, 8 * 2048 * 6 - 1))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"steps: " + b"9" * 5000, "Exceeds the limit"), (b"x: " + b"[" * 600, "recursion"),
        ("run: {name: größe}".encode("latin-1"), "utf-8"), (b"run: {name: !!python/name:os.system x}", "constructor"),
        (b"run: {name: [a}", "flow sequence"), (b"run: {name: a}\0", "unacceptable character"),
    ],
    ids=["digits", "brackets", "latin-1", "tag", "grammar", "nul"],
)  # fmt: skip
def test_a_file_that_is_no_yaml(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n" + content)
    done = python("train.py", f"--config-dir={tmp_path}", "experiment=mine", "model=opt-tiny")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/experiment/mine.yaml cannot be read as YAML (")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["steps", "data.text_field", "task.labels", "data.tokenizer"])
def test_a_missing_value_is_no_default(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}=\?\?\? means a missing value"):
        run_of("model=opt-tiny", f"{key}=???")


def test_quick_composition_is_hydras() -> None:
    """By which tests of training get their runs."""
    arguments = [
        "experiment=opt-125m-paper", "data.tokenizer=null", "precision=fp32", "data.train=[{path: a, weight: 2}]",
        "model.dropout=0", "optimizer.betas=[0.8,0.9]", "stop_at=3", "batch.global=8", "batch.micro=2", "run.name=a",
    ]  # fmt: skip
    for _ in range(2):  # what was composed once is not changed
        assert quick_run_of(*arguments) == run_of(*arguments, tokenizer=True)
        arguments.append("model.dropout=0.1")
