"""Finds, renames and deletes the checkpoint folders of a run."""

from __future__ import annotations

import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from opt_parallel.checkpoint.manifest import MANIFEST, STEP, read_manifest
from opt_parallel.config.paths import reach
from opt_parallel.config.run import Precision
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.atomic import PARTIAL, free_name, optional, remove, write_text
from opt_parallel.storage.checked import dump_checked, read_checked
from opt_parallel.storage.rows import METRICS, rows_of

BEST = "best.json"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, or None if the folder is not named step-<N> or has no manifest."""
    named = STEP.fullmatch(folder.name)
    return int(named[1]) if named and (folder / MANIFEST).is_file() else None


def steps_in(checkpoints: Path) -> list[int]:
    """The steps of the complete checkpoints, in ascending order."""
    return sorted(step for folder in checkpoints.glob("step-*") if (step := step_of(folder)) is not None)


def without_manifest(checkpoints: Path) -> list[Path]:
    """The folders with a checkpoint's name but without a manifest.

    An interrupted save or deletion does not leave such a folder."""
    named = [folder for folder in checkpoints.glob("step-*") if STEP.fullmatch(folder.name)]
    return sorted(folder for folder in named if step_of(folder) is None)


def misnamed_in(checkpoints: Path) -> list[Path]:
    """The checkpoint folders with a name that is not step-<N>, such as `step-02`."""
    named = [path for path in checkpoints.glob("step-*") if (path / MANIFEST).is_file() and "." not in path.name]
    return sorted(path for path in named if not STEP.fullmatch(path.name))


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint folder with the highest step, or None if there is no checkpoint."""
    steps = steps_in(checkpoints)
    return checkpoints / f"step-{steps[-1]}" if steps else None


def choose(resume: str, folder: Path) -> Path | None:
    """The checkpoint that the setting `resume` names, or None for a new run. The checkpoint's files are not checked.

    Raises: UserError if the checkpoint does not exist, or if `resume=never` would mix a new run with an old run."""
    reach("run.dir=", folder / "checkpoints")
    last = newest(folder / "checkpoints")
    if resume == "auto":
        return last
    if resume == "never":
        if last is not None:
            raise UserError(
                f"resume=never, but {last} exists, and a new run would mix with the old run: "
                "choose another run.dir or remove the folder"
            )
        return None
    chosen = reach("resume=", resume)
    if chosen is None or step_of(chosen) is None or not reach("resume=", chosen / MANIFEST):
        raise UserError(f"resume={resume} is not a complete checkpoint: choose auto, never or a folder …/step-<N>")
    return chosen


def precision_of(folder: Path | None) -> Precision | None:
    """The precision in which the checkpoint `folder` was trained, or None if no checkpoint names a precision.

    If the manifest is damaged, the result is the precision of the previous checkpoint, from which the run resumes."""
    if folder is None:
        return None
    for step in reversed([step for step in steps_in(folder.parent) if step <= (step_of(folder) or 0)]):
        with suppress(UserError, ValueError):  # raised if the manifest is damaged
            return Precision(read_manifest(folder.parent / f"step-{step}")["layout"]["precision"])
    return None


def retire(folder: Path, why: str) -> Path:
    """Rename a checkpoint to `<name>.<why>`, so that the run no longer uses it, and return the new path.

    Raises: UserError."""
    new = free_name(folder, why)
    try:
        os.rename(folder, new)
    except OSError as error:
        raise UserError(f"{folder} cannot be renamed to {new.name} ({error.strerror}): move it away") from error
    return new


def best_in(checkpoints: Path) -> dict[str, Any] | None:
    """The `step` and the validation `loss` of the best checkpoint, or None if there is no best.json.

    The values are read from best.json. If this file is damaged or names a checkpoint that does not exist, the values
    are read from the run's metrics."""
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
    """Write best.json again if it is damaged or names a checkpoint that does not exist.

    The file is removed if no checkpoint has a validation loss. With `keep_best`, the file is also written if another
    checkpoint is better, because a process may have been killed before it wrote best.json."""
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
    """Write best.json atomically. The file names the checkpoint with the lowest validation loss."""
    write_text(checkpoints / BEST, dump_checked({"step": step, "loss": loss}) + "\n")


def forget_old(checkpoints: Path, keep: int, keep_every: int) -> None:
    """Delete old and unfinished checkpoints. Do not call this function during a save.

    The newest `keep` checkpoints, the best checkpoint, and those at a multiple of `keep_every` steps are kept, where 0
    means no multiple. A warning is printed for each folder that cannot be deleted."""
    best = best_in(checkpoints)
    for step in steps_in(checkpoints)[:-keep]:
        if (keep_every and step % keep_every == 0) or (best and step == best["step"]):
            continue
        folder = checkpoints / f"step-{step}"
        with optional(folder, "deleted"):
            os.rename(folder, partial_of(folder, random_number()))  # so that a half-deleted folder has a temporary name
    remove_unfinished(checkpoints)


def remove_unfinished(checkpoints: Path) -> None:
    """Delete the folders that interrupted saves and deletions left. Do not call this function during a save."""
    for leftover in checkpoints.glob(f"step-*{PARTIAL}*"):
        remove(leftover)


def random_number() -> int:
    """A random number for the name of a temporary folder, see `partial_of`."""
    return secrets.randbits(31)


def partial_of(folder: Path, number: int) -> Path:
    """The temporary path of a checkpoint while it is written or deleted."""
    return folder.with_name(f"{folder.name}{PARTIAL}{number}")
