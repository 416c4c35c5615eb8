"""Two starts of a run in one folder: its arguments, and what must be true of the first and of the second."""

from __future__ import annotations

from pathlib import Path

from command import train_rows

RUN = ["steps=60", "batch.micro=4", "checkpoint.every=10", "checkpoint.keep=9"]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["lr"]) for row in train_rows(run)]


def weights(run: Path) -> dict[str, bytes]:
    paths = sorted((run / "checkpoints").glob("step-*/*.safetensors"))
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def assert_names(lines: list[str], run: Path) -> None:
    """Exactly one line says that another trains there, and who."""
    (line,) = [line for line in lines if line.startswith("error: ")]
    for part in (f"run.dir={run}", "another run writes to this folder", "process ", " on ", "since "):
        assert part in line


def assert_undisturbed(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)
    assert (run / "config.yaml").read_text().replace(str(run), str(straight)) == (straight / "config.yaml").read_text()
    assert (run / "state").read_text() == "done\n"
