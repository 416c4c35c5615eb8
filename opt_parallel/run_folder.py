"""The folder of a run, with its lock, state file and configuration, and the cleanup after killed processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from opt_parallel.checkpoint.folders import forget_old, newest, remove_unfinished, renew_best
from opt_parallel.checkpoint.manifest import read_manifest
from opt_parallel.config.compose import to_yaml
from opt_parallel.config.run import Run
from opt_parallel.report.trackers import WANDB_ID
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.atomic import PARTIAL, optional, remove, remove_leftovers, write_text
from opt_parallel.storage.lock import only_writer
from opt_parallel.storage.rows import METRICS
from opt_parallel.tools.compare import CONFIG, STATE

EXPORT = "export"
WRITTEN_FILES = (
    STATE,
    CONFIG,
    METRICS,
    "samples.jsonl",
    "curve.png",
    "confusion.png",
    WANDB_ID,
    EXPORT,
    "checkpoints/best.json",
)


def lock_folder(folder: Path) -> AbstractContextManager[None]:
    """Lock the run's folder while the context lasts. Raises: UserError that names the process that holds the lock."""
    return only_writer(folder, f"run.dir={folder}")


def write_state(folder: Path, state: str) -> None:
    """Write the run's state for batch scripts to the state file. The states are running, stopped (on a signal or at
    stop_at, so that the run can be resumed), diverged and done."""
    path = folder / STATE
    with optional(path):
        content = f"{state}\n"
        if not path.is_file() or path.read_bytes() != content.encode():  # the folder of a finished run may be read-only
            write_text(path, content)


def write_config(run: Run) -> None:
    """Write the resolved configuration to the run's folder."""
    with optional(run.folder / CONFIG):
        write_text(run.folder / CONFIG, to_yaml(run))


def clean_up(folder: Path) -> None:
    """Delete unfinished files that killed processes left in the run's folder. The caller must hold the folder's
    lock."""
    remove_unfinished(folder / "checkpoints")
    for name in WRITTEN_FILES:
        remove_leftovers(folder / name, any_host=True)
        remove(folder / f"{name}{PARTIAL}")  # earlier versions used this temporary name
    for probe in folder.glob(".preflight-*"):
        remove(probe)


def apply_retention(folder: Path) -> None:
    """Delete the checkpoints that the newest checkpoint replaces. Each save deletes these checkpoints. This function
    repeats the deletion for a finished run whose process was killed during its last save."""
    last = newest(folder / "checkpoints")
    if last is None:
        return  # the run resumes from a checkpoint in another folder
    try:
        settings = read_manifest(last)["config"]["checkpoint"]
    except (UserError, KeyError):
        return
    renew_best(last.parent, settings.get("keep_best", False))
    forget_old(last.parent, settings["keep"], settings.get("keep_every", 0))
