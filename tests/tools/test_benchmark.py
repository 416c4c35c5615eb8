"""The benchmark runs, measures all contenders by the same work, and says a mistake in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import ROOT, python
from composing import load_script
from metaseq_forms import Size, weights_of, write

from opt_parallel.benchmarks.runs import composed
from opt_parallel.runtime.errors import UserError

TINY = ["model=opt-tiny", "model.num_hidden_layers=1", "data.sequence_length=16", "batch.micro=2", "precision=fp32"]


def benchmark(*arguments: str) -> tuple[int, str, str]:
    process = python(str(ROOT / "scripts" / "benchmark.py"), *arguments)
    return process.returncode, process.stdout, process.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`here(*arguments)` runs the benchmark in this process, which has imported the libraries."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        module = load_script("benchmark")
        monkeypatch.setattr(module, "quiet_libraries", lambda: None)  # which changes the settings of this process
        module.main()

    return run


@pytest.mark.long
def test_a_race_of_all_at_tensor_two(tmp_path: Path) -> None:
    """Two rounds of a tiny model: every contender runs, from the same initial loss, ln of the vocabulary."""
    status, printed, said = benchmark(
        "train", "--processes", "2", "--threads", "1", "--rounds", "2", "--steps", "1", "--name", "tiny",
        "--output", str(tmp_path), *TINY, "parallel.tensor=2",
    )  # fmt: skip
    assert status == 0, said
    results = json.loads((tmp_path / "tiny.json").read_text())["results"]
    assert [result["name"] for result in results] == ["ours", "transformers", "autotp", "dtensor"]
    for result in results:
        assert not result["failure"], result
        assert len(result["tokens_per_second"]) == 2
        assert result["first_loss"] == pytest.approx(results[0]["first_loss"], abs=0.05)
        assert result["title"] in printed
    assert [(result["tensor"], result["data"]) for result in results] == [(2, 1), (1, 2), (2, 1), (2, 1)]
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


@pytest.mark.long
def test_who_cannot_run_is_named_with_the_reason(tmp_path: Path) -> None:
    status, printed, _ = benchmark(
        "train", "--contenders", "ours,autotp", "--rounds", "1", "--steps", "1", "--output", str(tmp_path), *TINY
    )
    assert status == 0
    assert "DeepSpeed AutoTP: not run: needs parallel.tensor > 1" in printed


def test_the_loss_alone() -> None:
    status, printed, said = benchmark("loss", "--tokens", "64", "--words", "500", "--width", "32", "--rounds", "2")
    assert status == 0, said
    assert "64 × 500" in printed


def test_the_collectives_alone() -> None:
    status, printed, said = benchmark("collectives", "--rounds", "1")
    assert status == 0, said
    assert len(printed.splitlines()[-5:]) == printed.count(" µs (") == 5


def test_connecting_ranks() -> None:
    """A rank opens few sockets, however many ranks there are."""
    status, printed, said = benchmark("ranks", "--processes", "2", "4")
    assert status == 0, said
    rows = [line.split() for line in printed.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["2", "4"]


@pytest.mark.long
def test_import_and_export() -> None:
    status, printed, said = benchmark("io", "--max-shard-size", "100KB", *TINY, "parallel.tensor=2")
    assert status == 0, said
    for line, what in zip(printed.splitlines()[-3:], ("rank 0 of 2", "rank 1 of 2", "export"), strict=True):
        assert what in line
        assert line.rstrip().endswith("yes")


@pytest.mark.long
def test_saving_and_loading_beside_deepspeed(tmp_path: Path) -> None:
    """The benchmark itself ends with an error where a load does not bring back what was saved."""
    status, printed, said = benchmark("checkpoint", "--rounds", "2", "--output", str(tmp_path), *TINY)
    assert status == 0, said
    assert "tensor 2 × data 2" in printed
    lines = [line.split("  ")[0] for line in printed.splitlines()[-6:]]
    assert lines[0].startswith("saving, the loop stands still")
    size = float(printed.splitlines()[-1].removeprefix("bytes on disk a parameter").split()[0])
    assert 12 <= size <= 12.5
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_one_of_many_ranks_resumes(tmp_path: Path) -> None:
    status, printed, said = benchmark(
        "resume", "--processes", "8", "--tensor", "2", "--tensor", "1", "--output", str(tmp_path), *TINY,
        "parallel.tensor=2",
    )  # fmt: skip
    assert status == 0, said
    assert "saved by 8 ranks (tensor 2 × data 4)" in printed
    for line, what in zip(printed.splitlines()[-2:], ("tensor 2 × data 4", "tensor 1 × data 8"), strict=True):
        assert line.startswith(what)
    assert not list(tmp_path.iterdir())


def test_generation_beside_transformers(here: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark itself ends with an error where the two do not make the same texts."""
    here(
        "generate", "--batch", "1", "--batch", "8", "--new", "6", "--rounds", "2", "--threads", "1",
        "model=opt-350m", "model.num_hidden_layers=2", "model.hidden_size=64", "model.ffn_dim=128",
        "model.word_embed_proj_dim=32", "model.vocab_size=500",
    )  # fmt: skip
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["1", "8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--processes", "3", *TINY, "parallel.tensor=2"], "--processes 3"),
        (["train", "modle=opt-tiny"], "modle"),
        (["train", "--rounds", "0"], "--rounds"),
        (["train", "--contenders", "ours,megatron"], "megatron"),
        (["train", "--contenders", "ours,ours"], "twice"),
        (["train", "batch.global=8"], "batch.global"),
        (["train", "zero.offload=cpu"], "zero.offload=none"),
        (["train", "--output", "/dev/null/here", *TINY], "/dev/null/here"),
        (["checkpoint", "--processes", "3", *TINY], "--processes 3"),
        (["ranks", "--processes", "3"], "--processes 3 must be a multiple of --tensor 2"),
        (["resume", "--processes", "8", "--tensor", "3", *TINY], "--tensor 3"),
        (["loss", "--tokens", "many"], "many"),
        (["generate", "--prompt", "2000"], "2048 positions"),
    ],
)
def test_a_mistake_is_one_line(
    here: Callable[..., None],
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(line: str, *_: object, **__: object) -> None:
        print(line, file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(
        "opt_parallel.runtime.errors.leave", stop
    )  # which ends the process; the next test sees it do so
    with pytest.raises((UserError, SystemExit)) as caught:
        here(*arguments)
    said = str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err
    assert words in said.splitlines()[-1]


def test_a_mistake_ends_with_status_2() -> None:
    status, printed, said = benchmark("train", "modle=opt-tiny")
    assert (status, printed, said.count("\n")) == (2, "", 1)
    assert "modle" in said


@pytest.mark.long
def test_the_time_to_start_a_layer() -> None:
    status, printed, said = benchmark("host", "--rounds", "1")
    assert status == 0, said
    rows = [tuple(line.split()[:2]) for line in printed.splitlines()[-8:]]
    modes = ("none", "selective", "full", "offload")
    assert rows == [(mode, sequence) for sequence in ("false", "true") for mode in modes]


@pytest.mark.long
def test_the_conversion_beside_copying(tmp_path: Path) -> None:
    write("raw", tmp_path / "raw", Size(), weights_of(Size()))
    arguments = ("--checkpoint", str(tmp_path / "raw"), "--rounds", "2", "--output", str(tmp_path / "out"))
    status, printed, said = benchmark("convert", *arguments)
    assert status == 0, said
    assert "in memory" in printed
    assert len(printed.splitlines()) == 6
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.long
def test_plans_are_compared_with_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round has a planned and a measured time of each shape; the settings that auto chooses come first."""
    from opt_parallel.benchmarks import predicted

    monkeypatch.setattr(predicted, "SHAPES", ((1, 64, 512, 1, 32), (2, 64, 512, 2, 32)))
    for timed in predicted.time_shapes(threads=1, rounds=2, steps=1):
        assert len(timed.planned) == len(timed.measured) == 2
        assert min(timed.planned + timed.measured) > 0
    model = ["model=opt-tiny", "model.num_hidden_layers=1", "data.sequence_length=16", "precision=fp32"]
    run = dataclasses.replace(composed(model), batch={"global": 4, "micro": 1})
    monkeypatch.setattr(predicted, "OTHERS", 1)
    chosen, other = predicted.time_auto(run, processes=2, threads=1, rounds=1, steps=1)
    assert chosen[0] != other[0]
    assert chosen[-1] == "1.00 (1.00-1.00)"


def test_the_rates_of_products_give_their_peak() -> None:
    """The fit returns the peak and the small dim from which the rates were computed."""
    from opt_parallel.benchmarks.cpu import SIZES, peak_and_small

    def rate(tokens: int, width: int) -> float:
        dims = (tokens, width, 4 * width)
        return 9e10 * math.prod(dim / (dim + 33) for dim in dims)

    peak, small = peak_and_small({size: rate(*size) for size in SIZES})
    assert small == 33
    assert peak == pytest.approx(9e10)
