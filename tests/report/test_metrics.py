"""What a run leaves behind and says: rows, resumption, speeds, lines, curve, trackers."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import LoggingConfig, Wandb
from opt_parallel.config.run import ActivationCheckpointing, DataConfig, Precision, PrecisionConfig, Run, RunConfig
from opt_parallel.report.metrics import Metrics, peak_tflops
from opt_parallel.report.trackers import check_trackers
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError

CPU = torch.device("cpu")
EPOCHS = {"train": 0.5}
QUIET = LoggingConfig(wandb=Wandb.disabled, tensorboard=False)
TRAIN_KEYS = {
    "checksum",
    "kind",
    "step",
    "samples",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "epochs",
    "data_wait",
    "tokens_per_second",
    "mfu",
    "hfu",
    "peak_memory_bytes",
}


def run_in(folder: Path, **fields: Any) -> Run:
    fields = {"steps": 10, "logging": QUIET, "data": DataConfig(sequence_length=128), **fields}
    return Run(run=RunConfig(name="demo", dir=str(folder)), **fields)


def at(step: int) -> Clock:
    return Clock(step, step * 8, step * 1000)


def take(metrics: Metrics, step: int, loss: float = 2.0, norm: float = 0.5) -> None:
    metrics.step(at(step), loss, norm, 3e-4, None, False, 0.0, EPOCHS)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Watch:
    """A host clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_rows_hold_the_promised_keys(tmp_path: Path) -> None:
    metrics = Metrics.open(run_in(tmp_path), 1, True, CPU, Clock())
    take(metrics, 1)
    metrics.validation(at(1), 3.0, None)
    metrics.abandon()
    train, validation = rows_of(tmp_path)
    assert train.keys() == TRAIN_KEYS
    assert (train["kind"], train["step"], train["samples"], train["tokens"]) == ("train", 1, 8, 1000)
    assert (train["loss"], train["lr"], train["grad_norm"], train["mfu"], train["hfu"]) == (2.0, 3e-4, 0.5, None, None)
    assert 10e6 < train["peak_memory_bytes"] < 1e12
    assert validation == {
        "kind": "validation", "step": 1, "loss": 3.0, "perplexity": pytest.approx(20.0855, abs=1e-4),
        "checksum": validation["checksum"],
    }  # fmt: skip


def test_fp16_rows_hold_the_loss_scale(tmp_path: Path) -> None:
    run = run_in(tmp_path, precision=PrecisionConfig(name=Precision.fp16))
    metrics = Metrics.open(run, 1, True, CPU, Clock())
    metrics.step(at(1), 2.0, float("inf"), 3e-4, 4.0, True, 0.0, EPOCHS)
    metrics.abandon()
    (row,) = rows_of(tmp_path)
    assert row.keys() == TRAIN_KEYS | {"loss_scale", "skipped"}
    assert (row["loss_scale"], row["skipped"], row["grad_norm"]) == (4.0, True, None)


def test_a_step_is_written_at_the_next_call(tmp_path: Path) -> None:
    metrics = Metrics.open(run_in(tmp_path), 1, True, CPU, Clock())
    take(metrics, 1)
    assert rows_of(tmp_path) == []
    take(metrics, 2)
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    metrics.validation(at(2), 3.0, None)
    take(metrics, 3)
    with metrics.pause():  # a checkpoint: what precedes it must be on disk
        assert [(row["kind"], row["step"]) for row in rows_of(tmp_path)] == [
            ("train", 1),
            ("train", 2),
            ("validation", 2),
            ("train", 3),
        ]
    take(metrics, 4)
    metrics.abandon()
    assert rows_of(tmp_path)[-1]["step"] == 4


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = Metrics.open(run_in(tmp_path), 1, True, CPU, Clock())
    take(metrics, 1, loss=float("nan"), norm=float("inf"))
    metrics.validation(at(1), 1000.0, None)  # whose perplexity overflows
    metrics.abandon()
    train, validation = rows_of(tmp_path)
    assert (train["loss"], train["grad_norm"]) == (None, None)
    assert (validation["loss"], validation["perplexity"]) == (1000.0, None)


def test_resuming_takes_back_rows_past_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    metrics = Metrics.open(run_in(tmp_path), 1, True, CPU, Clock())
    for step in (1, 2, 3):
        take(metrics, step)
        metrics.validation(at(step), 3.0, None)
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines()[:4]
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 1')
    metrics = Metrics.open(run_in(tmp_path), 1, True, CPU, at(2))
    assert path.read_text().splitlines() == kept
    take(metrics, 3, loss=5.0)
    metrics.close(finished=False)
    assert [row["loss"] for row in rows_of(tmp_path)] == [2.0, 3.0, 2.0, 3.0, 5.0]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]


def test_a_new_run_replaces_the_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 0}\n')
    Metrics.open(run_in(tmp_path), 1, True, CPU, Clock())
    assert rows_of(tmp_path) == []


def test_utilisation_of_opt_1b3_and_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """9.07 GFLOP a token at 2,048: 45,455 tokens/s are 41.7% of a 989 TFLOP/s device."""
    watch = Watch(monkeypatch)
    model = ModelConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192)
    run = run_in(
        tmp_path,
        model=model,
        data=DataConfig(sequence_length=2048),
        activation_checkpointing=ActivationCheckpointing.full,
        logging=LoggingConfig(wandb=Wandb.disabled, tensorboard=False, peak_tflops=989),
    )
    metrics = Metrics.open(run, 2, True, CPU, Clock())
    one = 1.0
    watch.now += 4.0
    metrics.step(Clock(1, 8, 363_640), one, one, 1e-4, None, False, 0.0, EPOCHS)
    with metrics.pause():
        watch.now += 1000.0
    watch.now += 2.0
    metrics.step(Clock(2, 16, 363_640 + 181_820), one, one, 1e-4, None, False, 0.0, EPOCHS)
    watch.now += 1.0
    metrics.step(Clock(3, 24, 363_640 + 181_820 + 90_910), one, one, 1e-4, None, False, 0.0, EPOCHS)
    metrics.abandon()
    assert len(rows_of(tmp_path)) == 3
    for row in rows_of(tmp_path):
        assert row["tokens_per_second"] == pytest.approx(2 * 45_455)
        assert row["mfu"] == pytest.approx(0.417, abs=5e-4)
        assert row["hfu"] == pytest.approx(0.417 * 11.08 / 9.07, abs=2e-3)  # and again what is recomputed


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", Precision.bf16, 312),
        ("NVIDIA A10", Precision.bf16, 125),
        ("NVIDIA A10G", Precision.bf16, None),
        ("NVIDIA H100 80GB HBM3", Precision.fp16, 989.4),
        ("NVIDIA H100 PCIe", Precision.bf16, 756),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", Precision.bf16, None),
        ("NVIDIA H200", Precision.bf16, 989.4),
        ("NVIDIA H200", Precision.fp32, None),
        ("Tesla V100-SXM2-32GB", Precision.fp16, 125),
        ("Tesla V100-SXM2-32GB", Precision.bf16, None),
        ("AMD Instinct MI300X", Precision.bf16, 1307.4),
        ("NVIDIA GeForce RTX 4090", Precision.bf16, None),
    ],
)
def test_peak_by_device_name(name: str, precision: Precision, expected: float | None) -> None:
    assert peak_tflops(name, precision) == expected


class Event:
    """A CUDA event on a device whose clock the test moves, in milliseconds."""

    device_clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = float("nan")

    def record(self) -> None:
        self.at = Event.device_clock

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize(("name", "mfu"), [("NVIDIA H200", 1e4 / 989.4e12), ("Some New GPU", None)])
def test_on_a_gpu_the_device_keeps_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, mfu: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    run = run_in(tmp_path, precision=PrecisionConfig(name=Precision.bf16))
    metrics = Metrics.open(run, 1, True, torch.device("cuda", 0), Clock())
    Event.device_clock += 100.0
    take(metrics, 1)
    metrics.abandon()
    (row,) = rows_of(tmp_path)
    assert (row["tokens_per_second"], row["peak_memory_bytes"]) == (pytest.approx(1e4), 12345)
    assert row["mfu"] == (None if mfu is None else pytest.approx(mfu * run.model.flops_per_token(128)))
    said = "peak bf16 FLOP/s of Some New GPU is unknown, so mfu and hfu are null: set logging.peak_tflops"
    assert capsys.readouterr().out.splitlines().count(said) == (1 if mfu is None else 0)


def test_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(monkeypatch)
    metrics = Metrics.open(run_in(tmp_path, steps=600), 1, True, CPU, at(119))
    watch.now += 0.4
    metrics.step(Clock(120, 960, 119_000 + 2048), 4.5123, 0.83, 3e-4, None, False, 0.0, EPOCHS)
    metrics.note("a word")
    metrics.abandon()
    assert capsys.readouterr().out.splitlines()[:2] == [
        "a word",
        "step 120/600  loss 4.512  lr 3.0e-04  |g| 0.83  5,120 tokens/s  ETA 3:12",
    ]


@pytest.mark.parametrize(
    ("steps", "first", "expected"),
    [(40, 1, list(range(1, 41))), (600, 1, [1, *range(6, 601, 6)]), (995, 986, [986, 990, 995])],
)
def test_about_a_hundred_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, first: int, expected: list[int]
) -> None:
    metrics = Metrics.open(run_in(tmp_path, steps=steps), 1, True, CPU, at(first - 1))
    for step in range(first, steps + 1):
        take(metrics, step)
    metrics.abandon()
    assert [int(step) for step in re.findall(r"^step (\d+)/", capsys.readouterr().out, re.MULTILINE)] == expected


def test_summary_and_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(monkeypatch)
    metrics = Metrics.open(run_in(tmp_path, steps=2), 1, True, CPU, Clock())
    curve = tmp_path / "curve.png"
    watch.now += 125.0
    metrics.step(Clock(1, 8, 1_250_000), 4.5, 1.0, 3e-4, None, False, 0.0, EPOCHS)
    metrics.close(finished=False)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped: demo at step 1 of 2, 1.2M tokens in 2:05; train loss 4.50; {curve}; "
        "the same command continues the run"
    )
    metrics = Metrics.open(run_in(tmp_path, steps=2), 1, True, CPU, Clock(1, 8, 1_250_000))
    watch.now += 3700.0
    metrics.step(Clock(2, 16, 2_500_000), 3.91, 1.0, 3e-4, None, False, 0.0, EPOCHS)
    metrics.validation(Clock(2, 16, 2_500_000), 4.02, 6.31)
    metrics.close(finished=True)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "finished: demo at step 2, 1.2M tokens in 1:01:40 since step 1; train loss 3.91, "
        f"validation loss 4.02 (unigram entropy 6.31, 2.29 nats below); {curve}"
    )
    metrics = Metrics.open(run_in(tmp_path, steps=3, stop_at=2), 1, True, CPU, Clock(2, 16, 2_500_000))
    metrics.close(finished=False)
    assert capsys.readouterr().out.endswith(f"{curve}; a larger stop_at continues the run\n")
    assert curve.read_bytes().startswith(b"\x89PNG")


def test_other_ranks_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics.open(run_in(tmp_path / "run"), 2, False, CPU, Clock())
    take(metrics, 1)
    metrics.validation(at(1), 3.0, None)
    metrics.note("nobody hears this")
    with metrics.pause():
        pass
    metrics.close(finished=True)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, and no wandb in the environment."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("WANDB_API_KEY", "WANDB_CACHE_DIR", "WANDB_MODE", "WANDB_PROJECT", "NETRC", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that the deletion is undone even where the code sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.chdir(home)
    return home


def test_wandb_offline_and_tensorboard(
    tmp_path: Path, homeless: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a wandb project and name from the environment."""
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    monkeypatch.setenv("WANDB_PROJECT", "my-project")
    monkeypatch.setenv("WANDB_NAME", "my-name")
    metrics = Metrics.open(run_in(folder, logging=LoggingConfig()), 1, True, CPU, Clock())
    for step in (1, 2, 3):
        take(metrics, step, loss=4.0 - step)
    metrics.validation(at(3), 1.5, None)
    metrics.abandon()
    wandb.teardown()  # its service writes behind our back, and has written when it has ended
    (recorded,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    written = recorded.read_bytes()  # compressed: what came up before is not spelled again
    assert b"train/" in written
    assert b"sequence_length" in written
    assert b"my-project" in written
    assert b"my-name" in written

    resumed = run_in(folder, logging=LoggingConfig(wandb=Wandb.disabled))
    metrics = Metrics.open(resumed, 1, True, CPU, at(2))
    take(metrics, 3, loss=0.5)
    metrics.abandon()
    events = EventAccumulator(str(folder / "logs" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 0.5)]
    assert events.Scalars("validation/loss") == []  # taken back with its step
    tensorboard = folder / "logs" / "tensorboard"
    assert all(path.is_file() for path in tensorboard.iterdir())  # no folder for a start's settings
    assert [path.read_bytes().count(b"_hparams_/session_start_info") for path in tensorboard.iterdir()] == [1, 1]

    out, err = capfd.readouterr()
    assert err == ""
    assert [line for line in out.splitlines() if not line.startswith(("step ", "validation at"))] == [
        "wandb follows the environment: WANDB_PROJECT=my-project, WANDB_NAME=my-name"
    ]
    assert list(homeless.iterdir()) == []


def test_wandb_online_without_a_key_says_what_to_do(homeless: Path) -> None:
    with pytest.raises(UserError) as raised:
        check_trackers(Wandb.online)
    message = str(raised.value)
    assert message.startswith("logging.wandb=online finds no API key: set WANDB_API_KEY")  # and nobody was asked
    assert "logging.wandb=offline" in message
    assert "\n" not in message
