"""A run's folder from one start to the next: its only writer, the state it is in, and what killed processes left."""

from __future__ import annotations

from contextlib import AbstractContextManager

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
WRITTEN = (
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


def only_run_in(run: Run) -> AbstractContextManager[None]:
    """While the context lasts, no other process trains in the run's folder. Raises: UserError that names the one that
    does."""
    return only_writer(run.folder, f"run.dir={run.folder}")


def write_state(run: Run, word: str) -> None:
    """Running, stopped (on request, to be continued), diverged or done. Launchers' scripts read it."""
    path = run.folder / STATE
    with optional(path):
        content = f"{word}\n"
        if not path.is_file() or path.read_bytes() != content.encode():  # a finished run's folder may be read-only
            write_text(path, content)


def write_config(run: Run) -> None:
    """The resolved configuration, as it was composed."""
    with optional(run.folder / CONFIG):
        write_text(run.folder / CONFIG, to_yaml(run))


def put_in_order(run: Run) -> None:
    """Delete what killed processes left; nobody else may write to the run's folder."""
    remove_unfinished(run.folder / "checkpoints")
    for name in WRITTEN:
        remove_leftovers(run.folder / name, any_host=True)
        remove(run.folder / f"{name}{PARTIAL}")  # of earlier versions
    for probe in run.folder.glob(".preflight-*"):
        remove(probe)


def forget_what_the_last_save_would(run: Run) -> None:
    """Delete the checkpoints that the newest made superfluous, where its process was killed before it could; where
    nothing is left to do, no later save will."""
    last = newest(run.folder / "checkpoints")
    if last is None:
        return  # `resume` names one elsewhere
    try:
        kept = read_manifest(last)["config"]["checkpoint"]
    except (UserError, KeyError):
        return
    renew_best(last.parent, kept.get("keep_best", False))
    forget_old(last.parent, kept["keep"], kept.get("keep_every", 0))
