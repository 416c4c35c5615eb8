"""A run's checkpoints as folders: which are there, which is the newest, which are whole, which may go."""

from __future__ import annotations

import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from opt_parallel.checkpoint.manifest import MANIFEST, STEP, read_manifest
from opt_parallel.config.paths import reach
from opt_parallel.config.run import Precision, Run
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.atomic import PARTIAL, free_name, optional, remove, write_text
from opt_parallel.storage.checked import dump_checked, read_checked
from opt_parallel.storage.rows import METRICS, rows_of

BEST = "best.json"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, None if its name or content says that it is none (or not whole)."""
    named = STEP.fullmatch(folder.name)
    return int(named[1]) if named and (folder / MANIFEST).is_file() else None


def steps_in(checkpoints: Path) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    return sorted(step for folder in checkpoints.glob("step-*") if (step := step_of(folder)) is not None)


def torn_in(checkpoints: Path) -> list[Path]:
    """Folders named as complete checkpoints that have lost their manifest: no save or deletion of ours leaves one."""
    named = [folder for folder in checkpoints.glob("step-*") if STEP.fullmatch(folder.name)]
    return sorted(folder for folder in named if step_of(folder) is None)


def misnamed_in(checkpoints: Path) -> list[Path]:
    """Checkpoints whose names no save gives, such as `step-02`."""
    named = [path for path in checkpoints.glob("step-*") if (path / MANIFEST).is_file() and "." not in path.name]
    return sorted(path for path in named if not STEP.fullmatch(path.name))


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step."""
    steps = steps_in(checkpoints)
    return checkpoints / f"step-{steps[-1]}" if steps else None


def choose(run: Run) -> Path | None:
    """The checkpoint that `resume` asks for, None for a fresh start. Its files are not looked at yet.

    Raises: UserError if it does not exist, or `never` would mix a new run with an old one."""
    reach("run.dir=", run.folder / "checkpoints")
    last = newest(run.folder / "checkpoints")
    if run.resume == "auto":
        return last
    if run.resume == "never":
        if last is not None:
            raise UserError(
                f"resume=never, but {last} exists: a new run there would mix with the old one; "
                "choose another run.dir or remove the folder"
            )
        return None
    chosen = reach("resume=", run.resume)
    if chosen is None or step_of(chosen) is None or not reach("resume=", chosen / MANIFEST):
        raise UserError(f"resume={run.resume} is no whole checkpoint: choose auto, never or a folder …/step-<N>")
    return chosen


def precision_of(folder: Path | None) -> Precision | None:
    """The precision in which the checkpoint `folder` was trained; if its manifest is damaged, that of the one before
    it, from which the run then goes on. None if there is none."""
    if folder is None:
        return None
    for step in reversed([step for step in steps_in(folder.parent) if step <= (step_of(folder) or 0)]):
        with suppress(UserError, ValueError):  # a damaged manifest
            return Precision(read_manifest(folder.parent / f"step-{step}")["layout"]["precision"])
    return None


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that nothing takes it for one of the run's; its new name. Raises: UserError."""
    aside = free_name(folder, why)
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise UserError(f"{folder} cannot be set aside as {aside.name} ({error.strerror}): move it away") from error
    return aside


def best_in(checkpoints: Path) -> dict[str, Any] | None:
    """`step` and validation `loss` of the checkpoint with the lowest loss: by best.json, or where that is damaged or
    names a checkpoint that is gone, by the run's metrics. None where the run does not keep its best."""
    if not os.path.lexists(checkpoints / BEST):
        return None
    try:
        best = read_checked(checkpoints / BEST)
    except (OSError, ValueError):
        return _best_by_metrics(checkpoints)
    step, loss = best.get("step"), best.get("loss")
    right = type(step) is int and isinstance(loss, float) and math.isfinite(loss)
    return {"step": step, "loss": loss} if right and step in steps_in(checkpoints) else _best_by_metrics(checkpoints)


def _best_by_metrics(checkpoints: Path) -> dict[str, Any] | None:
    steps, best = steps_in(checkpoints), None
    for row in rows_of(checkpoints.parent / METRICS):
        found = row.get("kind") == "validation" and row["step"] in steps and row["loss"] is not None
        if found and (best is None or row["loss"] < best["loss"]):
            best = {"step": row["step"], "loss": row["loss"]}
    return best


def renew_best(checkpoints: Path, keep_best: bool = False) -> None:
    """Write best.json anew where it is damaged or names a checkpoint that is gone; without another, remove it.

    `keep_best`: the run keeps its best; its process may have been killed before it named a better one."""
    if not keep_best and not os.path.lexists(checkpoints / BEST):
        return
    best = best_in(checkpoints)
    better = _best_by_metrics(checkpoints) if keep_best else None
    if better is not None and (best is None or better["loss"] < best["loss"]):
        best = better
    with optional(checkpoints / BEST):
        if best is None:
            (checkpoints / BEST).unlink(missing_ok=True)
        else:
            write_best(checkpoints, **best)


def write_best(checkpoints: Path, step: int, loss: float) -> None:
    """Name the checkpoint with the lowest validation loss, at once or not at all."""
    write_text(checkpoints / BEST, dump_checked({"step": step, "loss": loss}) + "\n")


def forget_old(checkpoints: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints, those at a multiple of `keep_every` steps (0: none), and the best;
    and what killed saves and deletions left. Nothing may be on its way. What cannot be deleted is said."""
    best = best_in(checkpoints)
    for step in steps_in(checkpoints)[:-keep]:
        if (keep_every and step % keep_every == 0) or (best and step == best["step"]):
            continue
        folder = checkpoints / f"step-{step}"
        with optional(folder, "deleted"):
            os.rename(folder, partial_of(folder, any_number()))  # so that half a deletion does not look whole
    remove_unfinished(checkpoints)


def remove_unfinished(checkpoints: Path) -> None:
    """Delete what killed saves and deletions left. Nothing may be on its way."""
    for leftover in checkpoints.glob(f"step-*{PARTIAL}*"):
        remove(leftover)


def any_number() -> int:
    """For `partial_of`: whatever was left there, by whomever, is in nobody's way."""
    return secrets.randbits(31)


def partial_of(folder: Path, number: int) -> Path:
    """The name that a checkpoint has while it is written and while it is deleted."""
    return folder.with_name(f"{folder.name}{PARTIAL}{number}")
