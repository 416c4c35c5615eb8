"""A run whose folder, or whose prepared text, is removed while it trains, or that loses a rank as it saves."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command import launch, small
from faults import faults, why_not
from training import trained
from two_starts import losses

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
RANKS = [1, pytest.param(2, marks=pytest.mark.long)]
TEXTS = ["all", *(pytest.param(what, marks=pytest.mark.long) for what in ("validation", "stream"))]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def remove(folder: Path) -> None:
    """At once: a save may be making files in it."""
    gone = folder.with_name("gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / "step-12").glob("*.safetensors")}


def struck(ranks: int, arguments: list[str], run: Path, strike: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """A run that waits after its save of step 4, is struck, and goes on."""
    there, released = run / "checkpoints" / "step-4" / "manifest.json", run.parent / "released"
    # what is waited for is gone with the folder: what waits then is released by another file
    rules = faults(f"write HANG {run}/metrics.jsonl", when=there, until=released)
    with ThreadPoolExecutor() as pool:
        process = pool.submit(launch, ranks, "train.py", *arguments, **rules)
        wait_until(lambda: there.exists() or process.done())
        strike()
        released.touch()
        return process.result()


def arguments_of(folder: Path, ranks: int) -> list[str]:
    held = folder / "held.txt"
    held.write_text("Sentence 61 of the made-up text tells that 61 times 61 is 3721. " * 3)
    return [
        *small(folder), f"parallel.tensor={ranks}", "steps=12", "batch.micro=4", "checkpoint.every=4",
        f"data.validation={held}", "evaluation.every=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[str]]]:
    """`straight(ranks, *more)`: the folder of a run that loses nothing, and its arguments. `cache` is beside it."""

    @functools.cache
    def of(ranks: int, *more: str) -> tuple[Path, list[str]]:
        folder = tmp_path_factory.mktemp("straight")
        arguments = [*arguments_of(folder, ranks), *more]
        process = trained(crew(ranks), *arguments)
        assert process.returncode == 0, process.stderr
        return folder / "run", arguments

    return of


@pytest.mark.parametrize("ranks", RANKS)
def test_the_folder_of_a_run(straight: Any, tmp_path: Path, ranks: int) -> None:
    """It is made anew, and nothing is missing at the end but what was removed."""
    (reference, arguments), run = straight(ranks), tmp_path / "run"
    process = struck(ranks, [*arguments, f"run.dir={run}"], run, lambda: remove(run))
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    warnings = [line for line in process.stdout.splitlines() if line.startswith("warning: ")]
    assert warnings == [f"warning: {run}/metrics.jsonl was removed or moved: it is created again with all its lines"]
    assert losses(run) == losses(reference)
    assert weights(run) == weights(reference)
    assert (run / "state").read_text() == "done\n"


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("what", TEXTS)
def test_the_prepared_text(crew: Any, straight: Any, tmp_path: Path, ranks: int, what: str) -> None:
    """One line, after a save; the same command makes it anew and goes on. The validation's is read at step 8."""
    more = ["data.stream=true"] if what == "stream" else []
    (reference, arguments), run, cache = straight(ranks, *more), tmp_path / "run", tmp_path / "cache"
    shutil.copytree(reference.parent / "cache", cache)
    sizes = {store: sum(path.stat().st_size for path in store.rglob("*.bin")) for store in cache.glob("store-*/")}
    folder = min(sizes, key=lambda store: sizes[store]) if what == "validation" else cache
    arguments = [*arguments, f"run.dir={run}", f"data.cache={cache}"]
    process = struck(ranks, arguments, run, lambda: remove(folder))
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    (saved,) = re.findall(rf"the same command resumes from {run}/checkpoints/step-(\d+)$", line)
    names = "stream|store" if what == "stream" else "store"  # the validation's text is a store, and may be read first
    assert re.match(f"error: {re.escape(str(cache))}/({names})-", line)
    assert "cannot be read (No such file or directory)" in line
    assert losses(run)[-1][0] == int(saved)
    assert int(saved) == 8 if what == "validation" else int(saved) > 4
    again = trained(crew(ranks), *arguments)
    assert again.returncode == 0, again.stderr
    assert f"continuing at step {saved}: " in again.stdout
    assert losses(run) == losses(reference)
    assert weights(run) == weights(reference)


def test_a_rank_that_is_lost_in_the_last_save_is_named(
    crew: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And not the disk, which took what the others wrote."""
    arguments = [*small(tmp_path), "steps=4", "batch.micro=4", "checkpoint.every=2", "parallel.tensor=2"]
    run = tmp_path / "run"
    file = "checkpoints/step-4.partial*/rank-00001.safetensors"
    with ThreadPoolExecutor() as pool:
        process = pool.submit(launch, 2, "train.py", *arguments, **faults(f"write HANG {run}/{file}"))
        wait_until(lambda: bool(list(run.glob(file))) or process.done())
        header = (run / "logs" / "rank-00001.log").read_text().partition("\n")[0]
        os.kill(int(header.rpartition("process ")[2]), signal.SIGKILL)
        ended = process.result()
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r", rank 0: another rank is gone.*: no answer from \S+, rank 1; the same command resumes", line)
    assert "could not be written" not in ended.stdout + ended.stderr
    assert (run / "checkpoints" / "step-2" / "manifest.json").is_file()
    if not request.config.getoption("long"):  # test_kill resumes after such a save
        return
    again = trained(crew(2), *arguments)
    assert again.returncode == 0, again.stderr
    assert "continuing at step 2: " in again.stdout
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]
