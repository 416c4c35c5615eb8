"""Experiment trackers, wandb and TensorBoard, through accelerate."""

from __future__ import annotations

import os
from typing import Any

from opt_parallel.clock import Clock
from opt_parallel.compose import recorded
from opt_parallel.config import Run, Wandb
from opt_parallel.errors import UserError, one_line

Tracker = Any  # an accelerate.tracking.GeneralTracker; accelerate is untyped, and imported only where it is used


def check_trackers(run: Run) -> None:
    """Raise UserError if wandb is wanted online and has no key: before a process group exists, on every rank alike."""
    if run.logging.wandb is not Wandb.online:
        return
    import wandb

    wandb.setup(settings=_quiet_settings())
    try:
        found = wandb.login(prompt=False, verify=False)  # wandb.init would ask at the terminal
    except wandb.Error as error:
        raise UserError(f"logging.wandb=online: {one_line(error)}; check WANDB_API_KEY") from error
    if not found:
        raise UserError(
            "logging.wandb=online finds no API key: set WANDB_API_KEY, run `wandb login` once, "
            "or use logging.wandb=offline"
        )


def open_trackers(run: Run, clock: Clock) -> list[Tracker]:
    """The experiment trackers, started and told the resolved configuration."""
    if run.logging.wandb is Wandb.disabled and not run.logging.tensorboard:
        return []
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState()  # the trackers ask it who is main; it takes the process group it finds and makes none
    trackers: list[Tracker] = []
    if run.logging.wandb is not Wandb.disabled:
        trackers.append(_open_wandb(run))
    if run.logging.tensorboard:
        # purge_step hides the events of steps that will be run again, as `_keep_rows` does
        tensorboard = TensorBoardTracker("tensorboard", run.folder / "logs", purge_step=clock.step + 1)
        tensorboard.start()
        trackers.append(tensorboard)
    settings = _flat(recorded(run))
    for tracker in trackers:
        tracker.store_init_configuration(settings)
    return trackers


def _open_wandb(run: Run) -> Tracker:
    mode, folder = run.logging.wandb, run.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)  # where it is missing, wandb writes elsewhere
    os.environ["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")  # where its service logs
    import wandb
    from accelerate.tracking import WandBTracker

    settings = _quiet_settings()
    tracker = WandBTracker("opt-parallel", name=run.run.name, dir=str(folder), mode=mode.value, settings=settings)
    try:
        tracker.start()
    except wandb.Error as error:
        raise UserError(
            f"logging.wandb={mode.value} failed: {one_line(error)}; check WANDB_API_KEY and the network, "
            "or use logging.wandb=offline or disabled"
        ) from error
    return tracker


def _quiet_settings() -> Any:
    import wandb

    return wandb.Settings(silent=True, console="off")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested sections as `section.key`; what TensorBoard cannot hold (null, lists) as text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
