"""The experiment trackers wandb and TensorBoard, used through accelerate."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opt_parallel.config.compose import recorded
from opt_parallel.config.output import Wandb
from opt_parallel.config.run import Run
from opt_parallel.config.values import flat
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.log import say
from opt_parallel.storage.atomic import optional, write_text

Tracker = Any  # An accelerate.tracking.GeneralTracker; accelerate has no types and is imported late.
WANDB_ID = "wandb-id"  # The file in a run's folder that holds the run's wandb id.
MODE, CACHE = "WANDB_MODE", "WANDB_CACHE_DIR"
# Environment variables of wandb that override our settings.
FOLLOWED = (MODE, "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME")
MODES = {
    "online": Wandb.online, "run": Wandb.online, "shared": Wandb.online,
    "offline": Wandb.offline, "dryrun": Wandb.offline, "disabled": Wandb.disabled,
}  # fmt: skip

caches = {""}  # values of WANDB_CACHE_DIR that this process set


def wandb_mode(setting: Wandb) -> Wandb:
    """The wandb mode from WANDB_MODE, or else from the configuration. `logging.wandb=disabled` has precedence over
    WANDB_MODE. Raises: UserError."""
    if setting is Wandb.disabled or not os.environ.get(MODE):
        return setting
    mode = MODES.get(os.environ[MODE])
    if mode is None:
        raise UserError(f"{MODE}={os.environ[MODE]} does not exist: choose {', '.join(MODES)}, or unset it")
    return mode


def wandb_id(setting: Wandb, folder: Path, saved: str | None = None, new: bool = False) -> str | None:
    """The run's wandb id, which is stored in the run's folder, or None without wandb. `saved` is the id in the
    checkpoint from which the run resumes. `new` creates a new wandb run, for a fresh start or for a run that branches
    off an older checkpoint."""
    if wandb_mode(setting) is Wandb.disabled:
        return None
    path = folder / WANDB_ID
    stored = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    known = stored if re.fullmatch(r"[\w-]{1,64}", stored) else saved
    name = os.environ.get("WANDB_RUN_ID") or (None if new else known) or secrets.token_hex(4)
    if new and saved:
        say(f"wandb: run {name} branches off run {saved}")
    if name != stored:
        with optional(path):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, f"{name}\n")
    return name


def check_trackers(setting: Wandb) -> None:
    """Raise UserError if wandb is online and has no API key. All ranks call this function, while no collective is
    pending."""
    if wandb_mode(setting) is not Wandb.online:
        return
    import wandb

    wandb.setup(settings=_quiet_settings())
    try:
        found = wandb.login(prompt=False, verify=False)  # wandb.init would ask for a key at the terminal
    except wandb.Error as error:
        raise UserError(f"{_wanted(setting)}: {one_line(error)}; check WANDB_API_KEY") from error
    if not found:
        raise UserError(
            f"{_wanted(setting)} finds no API key: set WANDB_API_KEY, run `wandb login` once, or use "
            f"{_wanted(setting, 'offline')}"
        )


class Trackers:
    """The experiment trackers of a run. A tracker that fails, for example on a full disk, is removed with a warning,
    and the run continues."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self.active = list(trackers)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._with_each(lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        self._with_each(lambda tracker: tracker.finish())

    def _with_each(self, work: Callable[[Tracker], Any]) -> None:
        for tracker in list(self.active):
            try:
                work(tracker)
            except Exception as error:  # trackers raise errors of many types
                self.active.remove(tracker)
                say(f"warning: {tracker.name} failed ({_reason(error)}): the run continues without it")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def open_trackers(run: Run, clock: Clock, name: str | None = None) -> Trackers:
    """Start the experiment trackers and log the resolved configuration. `name` is the run's wandb id."""
    followed = [f"{each}={os.environ[each]}" for each in FOLLOWED if os.environ.get(each)]
    if followed and run.logging.wandb is not Wandb.disabled:
        say(f"wandb follows the environment: {', '.join(followed)}")
    name = name or wandb_id(run.logging.wandb, run.folder)
    if name is None and not run.logging.tensorboard:
        return Trackers([])
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard.summary import hparams

    threading.excepthook = _quiet_tensorboard
    PartialState()  # Trackers read the rank from PartialState, which uses the existing process group.
    # TensorBoard stores neither null nor lists
    known = (bool, int, float, str)
    settings = {key: each if isinstance(each, known) else str(each) for key, each in flat(recorded(run)).items()}
    trackers = []
    if name is not None:
        with optional(run.folder / "wandb"):
            wandb = _open_wandb(run, name)
            wandb.store_init_configuration(settings)
            trackers.append(wandb)
    if run.logging.tensorboard:
        with optional(run.folder / "logs" / "tensorboard"):
            # purge_step hides the events of steps that will be repeated.
            tensorboard = TensorBoardTracker("tensorboard", run.folder / "logs", purge_step=clock.step + 1)
            tensorboard.start()
            # The tracker's own method would create two folders at each start.
            for summary in hparams(settings, {}):
                tensorboard.writer.file_writer.add_summary(summary)
            trackers.append(tensorboard)
    return Trackers(trackers)


def _quiet_tensorboard(arguments: threading.ExceptHookArgs) -> None:
    """A `threading.excepthook` that ignores errors in TensorBoard's thread, because the next call of `log` raises them
    again."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(arguments)


def _open_wandb(run: Run, name: str) -> Tracker:
    folder = run.folder.resolve()
    if os.environ.get(CACHE, "") in caches:  # wandb's service writes its log to this folder
        os.environ[CACHE] = str(folder / "wandb" / "cache")
        caches.add(os.environ[CACHE])
    import wandb
    from accelerate.tracking import WandBTracker

    ours = {"name": run.name, "dir": str(folder), "mode": run.logging.wandb.value, "resume": "allow"}
    arguments = {key: value for key, value in ours.items() if not os.environ.get(f"WANDB_{key.upper()}")}
    project = os.environ.get("WANDB_PROJECT") or "opt-parallel"
    tracker = WandBTracker(project, id=name, settings=_quiet_settings(), **arguments)
    try:
        tracker.start()
    except wandb.Error as error:
        raise UserError(
            f"{_wanted(run.logging.wandb)} failed: {one_line(error)}; check WANDB_API_KEY and the network, or use "
            f"{_wanted(run.logging.wandb, 'offline')} or disabled"
        ) from error
    return tracker


def _wanted(setting: Wandb, mode: str | None = None) -> str:
    """The setting of the wandb mode for messages, such as `WANDB_MODE=online` or `logging.wandb=online`, with its
    present value or with `mode`."""
    if os.environ.get(MODE):
        return f"{MODE}={mode or os.environ[MODE]}"
    return f"logging.wandb={mode or setting.value}"


def _quiet_settings() -> Any:
    import wandb

    return wandb.Settings(silent=True, console="off")
