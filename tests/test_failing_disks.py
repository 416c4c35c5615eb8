"""A run on a disk that refuses: each file × each error. What the user reads, what is saved, the status.

    python -m pytest --long -s -n 0 tests/test_failing_disks.py        # prints the table

Default: the cells that tell most. In each, the same command on a good disk then finishes the run, to the same bits.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import launch, small, train_rows
from crew import Crew
from faults import faults, why_not
from training import trained

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
ERRORS = {  # the calls that a disk in that state refuses
    "ENOSPC": ("open", "write", "mkdir"),
    "EIO": ("write", "fsync", "truncate"),
    "EROFS": ("open", "write", "mkdir", "rename", "link", "remove", "truncate"),
    "EINVAL": ("fsync",),  # a file system without such a thing
}
WORDS = {"ENOSPC": "No space left on device", "EIO": "Input/output error", "EROFS": "Read-only file system"}
GOES_ON, NOT_SAVED, NOT_EXPORTED, REFUSED = "goes on", "not saved", "not exported", "refused"


@dataclass(frozen=True)
class Row:
    """`pattern`: within the run's folder, or the cache's; `outcome` of a refusal; `calls`: only these are refused;
    `from_step`: once that checkpoint is there."""

    name: str
    pattern: str
    outcome: str = GOES_ON
    calls: tuple[str, ...] = ()
    ranks: int = 1
    from_step: int = 0
    in_cache: bool = False
    arguments: tuple[str, ...] = ()


STREAM = ("data.stream=true",)
SAVE = "checkpoints/step-[46].partial*/"
ROWS = [
    Row("metrics.jsonl", "metrics.jsonl*"),
    Row("metrics.jsonl, from step 2 to 4", "metrics.jsonl*", from_step=2),
    Row("samples.jsonl", "samples.jsonl*"),
    Row("checkpoints/best.json", "checkpoints/best.json*"),
    Row("state", "state*"),
    Row("config.yaml", "config.yaml*"),
    Row("logs/rank-00000.log", "logs/*.log"),
    Row("logs/rank-00001.log", "logs/rank-00001.log", ranks=2),
    Row("logs/", "logs/*", calls=("mkdir", "open", "write")),
    Row("logs/tensorboard/", "logs/tensorboard/*", arguments=("logging.tensorboard=true",)),
    Row("curve.png", "curve.png*"),
    Row("wandb-id", "wandb-id*", arguments=("logging.wandb=offline",)),
    Row("lock: its beats", "lock", calls=("write", "fsync")),
    Row("lock: flock", "lock", calls=("flock",)),
    Row("lock: its making", "lock", REFUSED, calls=("open",)),
    Row("run.dir", "", REFUSED, calls=("mkdir",)),
    Row("a save's folder", SAVE.removesuffix("/"), NOT_SAVED, calls=("mkdir",)),
    Row("a save's folder: names", SAVE, NOT_SAVED, calls=("fsync",)),
    Row("a save: rank-00000.safetensors", SAVE + "rank-00000.safetensors", NOT_SAVED),
    Row("a save: rank-00001.safetensors", SAVE + "rank-00001.safetensors", NOT_SAVED, ranks=2),
    Row("a save: rank-00000.json", SAVE + "rank-00000.json", NOT_SAVED),
    Row("a save: fragments.safetensors", SAVE + "fragments.safetensors", NOT_SAVED),
    Row("a save: tokenizer/", SAVE + "tokenizer*", NOT_SAVED),
    Row("a save: manifest.json", SAVE + "manifest.json", NOT_SAVED),
    Row("a save: its name", "checkpoints/step-[46]", NOT_SAVED, calls=("rename",)),
    Row("checkpoints/: names", "checkpoints/", calls=("fsync",)),
    Row("an older checkpoint's removal", "checkpoints/step-2.partial*", calls=("rename",)),
    Row("an older checkpoint's files", "checkpoints/step-2.partial*", calls=("remove",), from_step=4),
    Row("a failed save's removal", SAVE + "*", NOT_SAVED, calls=("write", "remove")),
    Row("checkpoints/, from step 2 on", "checkpoints/*", NOT_SAVED, from_step=2),
    Row("run.dir, from step 2 on", "*", NOT_SAVED, from_step=2),
    Row("export/: its weights", "export.*.partial/*", NOT_EXPORTED),
    Row("export/: its name", "export", NOT_EXPORTED, calls=("rename",)),
    Row("data.cache: tokenizer", "tokenizer-*", REFUSED, in_cache=True),
    Row("data.cache: a store's part", "store-*.bin*", REFUSED, in_cache=True),
    Row("data.cache: a stream's part", "stream-*.bin*", REFUSED, in_cache=True, arguments=STREAM),
    Row("data.cache: store.json", "store-*store.json*", REFUSED, in_cache=True),
    Row("data.cache: its name", "store-????????????????", REFUSED, calls=("rename",), in_cache=True),
    Row("data.cache: a lock", "*.lock", REFUSED, calls=("open",), in_cache=True),
]
TELLING = {
    ("metrics.jsonl, from step 2 to 4", "ENOSPC"),
    ("a save: manifest.json", "EINVAL"),
    ("run.dir, from step 2 on", "EROFS"),
}


def calls_of(row: Row, error: str) -> tuple[str, ...]:
    """What is refused: of a row that is about certain calls those, if the error may come from them."""
    if not row.calls:
        return ERRORS[error]
    if error == "EINVAL":
        return tuple(call for call in row.calls if call in ("fsync", "flock"))
    return tuple(call for call in row.calls if call not in ("fsync", "flock") or error == "EIO")


CELLS = [(row, error) for row, error in itertools.product(ROWS, ERRORS) if calls_of(row, error)]
PARAMETERS = [
    pytest.param(row, error, id=f"{row.name}-{error}", marks=[] if (row.name, error) in TELLING else [pytest.mark.long])
    for row, error in CELLS
]


def arguments_of(folder: Path, run: Path, cache: Path) -> list[str]:
    held = folder / "held.txt"
    held.write_text("Sentence 61 of the made-up text tells that 61 times 61 is 3721. " * 3)
    return [
        *small(folder), "steps=6", "batch.micro=4", "checkpoint.every=2", "checkpoint.keep=1",
        "checkpoint.keep_best=true", f"data.validation={held}", "evaluation.every=2", "evaluation.prompts=[Sentence 1]",
        "evaluation.max_new_tokens=4", "export.at_end=true", f"run.dir={run}", f"data.cache={cache}",
    ]  # fmt: skip


@dataclass(frozen=True)
class Straight:
    """Runs on a good disk, of one rank and of two, and of a stream, whose samples come in another order."""

    folder: Path
    crew: Callable[[int], Crew]

    def like(self, row: Row) -> Path:
        """The folder of the run that is like `row`, made at the first call."""
        run = self.folder / ("stream" if row.arguments == STREAM else str(row.ranks))
        if not run.exists():
            arguments = arguments_of(self.folder, run, self.folder / "cache")
            more = row.arguments if row.arguments == STREAM else ()
            process = trained(self.crew(row.ranks), *arguments, f"parallel.tensor={row.ranks}", *more)
            assert process.returncode == 0, process.stderr
            assert said(process) == ([], [])
        return run


@pytest.fixture(scope="module")
def straight(crew: Callable[[int], Crew], tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"), crew)


def weights(run: Path) -> dict[str, bytes]:
    paths = sorted((run / "checkpoints" / "step-6").glob("*.safetensors"))
    return {path.name: path.read_bytes() for path in paths}


def steps_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*") if path.is_dir())


def said(process: subprocess.CompletedProcess[str]) -> tuple[list[str], list[str]]:
    """Warnings, and all that went to standard error."""
    return [line for line in process.stdout.splitlines() if line.startswith("warning: ")], process.stderr.splitlines()


def tell(row: Row, error: str, process: subprocess.CompletedProcess[str], run: Path, cache: Path) -> None:
    """A row of the table."""
    warnings, errors = said(process)
    lines = [line.replace(f"{run}", "RUN").replace(f"{cache}", "CACHE") for line in [*warnings, *errors]]
    lines = [re.sub(r"(\.partial|[-.])[0-9a-f-]{8,16}\b|\.partial\d+", r"\1#", line) for line in lines]
    print(f"\n== {row.name} | {error} at {', '.join(calls_of(row, error))} | status {process.returncode} | "
          f"{' '.join(steps_in(run)) or 'no checkpoint'}")  # fmt: skip
    for line in lines:
        print(f"   {line}")


@pytest.fixture
def where(straight: Straight, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    yield tmp_path / "run", tmp_path / "cache"
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("row", "error"), PARAMETERS)
def test_a_disk_that_refuses(straight: Straight, where: tuple[Path, Path], row: Row, error: str) -> None:
    run, cache = where
    expected = straight.like(row)
    if not row.in_cache:
        cache = straight.folder / "cache"
    arguments = [*arguments_of(straight.folder, run, cache), f"parallel.tensor={row.ranks}", *row.arguments]
    pattern = f"{cache if row.in_cache else run}/{row.pattern}".removesuffix("/" * (not row.pattern))
    when = run / "checkpoints" / f"step-{row.from_step}" / "manifest.json" if row.from_step else None
    refuse = faults(*(f"{call} {error} {pattern}" for call in calls_of(row, error)), when=when)
    process = launch(row.ranks, "train.py", *arguments, **refuse)
    tell(row, error, process, run, cache)
    warnings, errors = said(process)
    outcome = GOES_ON if error == "EINVAL" else row.outcome
    assert "Traceback" not in process.stdout + process.stderr
    assert not any("Traceback" in path.read_text() for path in (run / "logs").glob("*.log") if outcome == GOES_ON)
    assert process.returncode == (0 if outcome == GOES_ON else 2)
    assert len(warnings) == len(set(warnings))  # each is said once
    assert "remove" in calls_of(row, error) or not list(run.rglob("*.partial*"))
    if outcome == GOES_ON:
        assert errors == []
        assert weights(run) == weights(expected)
        assert (run / "export" / "checkpoint.json").is_file()
    else:
        (line,) = errors
        assert line.startswith("error: ")
        assert WORDS[error] in line
    if outcome == NOT_SAVED:
        assert "step-2" in steps_in(run)
        assert f"{run}/checkpoints/step-2 is complete" in errors[0]
    if outcome == NOT_EXPORTED:
        assert f"{run}/checkpoints/step-6 is complete" in errors[0]

    again = trained(straight.crew(row.ranks), *arguments)
    assert again.returncode == 0, again.stderr
    assert weights(run) == weights(expected)
    if row.name != "metrics.jsonl" or error == "EINVAL":
        assert [each["step"] for each in train_rows(run)] == [1, 2, 3, 4, 5, 6]
    else:  # no row was ever taken, which was said
        assert warnings[-1] == f"warning: the last 9 lines of {run}/metrics.jsonl could not be written"
    assert steps_in(run) == ["step-6"]
    assert (run / "export" / "checkpoint.json").is_file()
    assert (run / "state").read_text() == "done\n"
    assert not list(run.rglob("*.partial*"))


@pytest.mark.long
@pytest.mark.parametrize("options", ["ro", "nr_inodes=2", "size=8k"])
def test_wandb_on_a_disk_that_refuses(straight: Straight, tmp_path: Path, options: str) -> None:
    """A real one: its service is a program that no library comes in front of."""
    run = tmp_path / "run"
    disk = run / "wandb"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        arguments = arguments_of(straight.folder, run, straight.folder / "cache")
        process = launch(1, "train.py", *arguments, "logging.wandb=offline")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=False)
    warnings, errors = said(process)
    print(f"\n== wandb/, {options} | status {process.returncode} | {' '.join(steps_in(run))}")
    for line in [*warnings, *errors]:
        print(f"   {line.replace(str(run), 'RUN')}")
    assert process.returncode == 0
    assert errors == []
    (line,) = warnings
    assert "wandb" in line
    assert weights(run) == weights(straight.like(Row("", "")))
