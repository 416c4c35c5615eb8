"""A run's checkpoints as folders: which are there, which is the newest, which are whole, which may go."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from opt_parallel.config import Run
from opt_parallel.errors import UserError
from opt_parallel.manifest import MANIFEST, read_manifest
from opt_parallel.storage.atomic import write_text

BEST = "best.json"
CHUNK = 2**20  # bytes read at a time: they stay in the cache until they are summed up
DAMAGE = ("is whole", "is missing", "has another size than was written", "differs from its checksum")


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, None if its name or content says that it is none (or not whole)."""
    prefix, _, number = folder.name.partition("-")
    complete = prefix == "step" and number.isdigit() and (folder / MANIFEST).is_file()
    return int(number) if complete else None


def steps_in(checkpoints: Path) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    return sorted(step for folder in checkpoints.glob("step-*") if (step := step_of(folder)) is not None)


def torn_in(checkpoints: Path) -> list[Path]:
    """Folders named as complete checkpoints that have lost their manifest: no save or deletion of ours leaves one."""
    named = [folder for folder in checkpoints.glob("step-*") if folder.name.removeprefix("step-").isdigit()]
    return sorted(folder for folder in named if step_of(folder) is None)


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step."""
    steps = steps_in(checkpoints)
    return checkpoints / f"step-{steps[-1]}" if steps else None


def choose(run: Run) -> Path | None:
    """The checkpoint that `resume` asks for, None for a fresh start. Its files are not looked at yet.

    Raises: UserError if it does not exist, or `never` would mix a new run with an old one."""
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
    chosen = Path(run.resume)
    if step_of(chosen) is None:
        raise UserError(f"resume={run.resume} is no whole checkpoint: choose auto, never or a folder …/step-<N>")
    return chosen


def checksum_of(path: Path) -> str:
    """CRC-32 of a file in hexadecimal."""
    checksum, buffer = 0, bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
    return f"{checksum:08x}"


def damage_of(path: Path, written: dict[str, Any]) -> int:
    """What is wrong with a checkpoint's file, as its number in `DAMAGE`; `written` is what the manifest says of it."""
    try:
        if path.stat().st_size != written["bytes"]:
            return 2
        return 0 if checksum_of(path) == written["crc32"] else 3
    except OSError:
        return 1


def damages_in(folder: Path, share: int = 0, of: int = 1) -> dict[str, int] | None:
    """The damage of each file that share number `share` of `of` has to check; None if the manifest cannot be read."""
    try:
        files = read_manifest(folder)["files"]
    except UserError:
        return None
    return {name: damage_of(folder / name, files[name]) if n % of == share else 0 for n, name in enumerate(files)}


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that nothing takes it for one of the run's; its new name."""
    taken = len(list(folder.parent.glob(f"{folder.name}.{why}*")))
    aside = folder.with_name(f"{folder.name}.{why}{taken or ''}")
    os.replace(folder, aside)
    return aside


def best_in(checkpoints: Path) -> dict[str, Any] | None:
    """`step` and validation `loss` of the checkpoint with the lowest loss, where best.json names one that is there."""
    try:
        best = json.loads((checkpoints / BEST).read_text())
        known = {"step": int(best["step"]), "loss": float(best["loss"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if step_of(checkpoints / f"step-{known['step']}") is not None else None


def write_best(checkpoints: Path, step: int, loss: float) -> None:
    """Name the checkpoint with the lowest validation loss, at once or not at all."""
    write_text(checkpoints / BEST, json.dumps({"step": step, "loss": loss}) + "\n")


def forget_old(checkpoints: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints, those at a multiple of `keep_every` steps (0: none), and the best;
    and what killed saves and deletions left. Nothing may be on its way."""
    best = best_in(checkpoints)
    for step in steps_in(checkpoints)[:-keep]:
        if (keep_every and step % keep_every == 0) or (best and step == best["step"]):
            continue
        folder = checkpoints / f"step-{step}"
        os.replace(folder, partial_of(folder))  # first: half a deletion leaves nothing that looks whole
    for leftover in checkpoints.glob("step-*.partial"):
        shutil.rmtree(leftover)


def partial_of(folder: Path) -> Path:
    """The name that a checkpoint has while it is written and while it is deleted."""
    return folder.with_name(f"{folder.name}.partial")
