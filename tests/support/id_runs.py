"""Trains from a training text and returns the losses."""

from __future__ import annotations

from pathlib import Path

from command import SMALL, launch, train_rows

STEPS = 20


def losses(folder: Path, name: str, *arguments: str, layouts: tuple[int, ...] = (1,)) -> list[float]:
    """The losses of a run on the training text `name`, which is resumed with each tensor degree in turn."""
    run, steps = folder / "runs" / f"{len(list(folder.glob('runs/*')))}", STEPS // len(layouts)
    for number, tensor in enumerate(layouts, start=1):
        ended = launch(
            tensor, "train.py", *SMALL, f"data.train={name}", f"data.tokenizer={folder / 'tokenizer'}",
            f"data.cache={folder / 'cache'}", f"run.dir={run}", f"parallel.tensor={tensor}", f"steps={STEPS}",
            f"stop_at={number * steps}", *arguments,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    rows = train_rows(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]
