"""The runs of a sweep (Hydra's multirun), with their swept values, folder names and errors."""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from opt_parallel.config.compose import explain, one_line_errors
from opt_parallel.config.run import Run
from opt_parallel.runtime.errors import Diverged, UserError
from opt_parallel.runtime.log import quiet_libraries
from opt_parallel.runtime.process import is_main, world_size
from opt_parallel.runtime.terminal import open_streams, outlive
from opt_parallel.storage.rows import METRICS, rows_of

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
DIVERGED: list[str] = []  # The swept values of each run of this process that diverged.
LONGEST_NAME = 200  # Maximum length of a folder name in bytes; most file systems allow 255, some fewer.


class RememberSweep(Callback):
    """A Hydra callback that stores the keys that the sweep does not vary, in Hydra's configuration. Jobs on other hosts
    need these keys, because they do not have the command line."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {override.get_key_element() for override in given if override.is_sweep_override()}
        fixed = [f"'{key}'" for key in dict.fromkeys(each.get_key_element() for each in given) if key not in swept]
        # Hydra applies these overrides to each run. `override_dirname` is a setting of Hydra itself.
        config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")


def is_sweep() -> bool:
    """Whether Hydra's current job belongs to a multirun."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def runs_elsewhere() -> bool:
    """Whether the current job does not run in the process of the command, as with Hydra's submitit launcher."""
    return is_sweep() and HydraConfig.get().launcher._target_ != BASIC_LAUNCHER


def check_sweep(run: Run) -> None:
    """Raise UserError if a sweeper minimises the validation loss, such as Optuna's, and the run does not validate."""
    if HydraConfig.get().sweeper._target_ != BASIC_SWEEPER and run.evaluation.every == 0:
        raise UserError(
            "evaluation.every=0, but the sweeper minimises the validation loss: set the steps between two validations",
            shared=True,
        )


def minimised(run: Run) -> float | None:
    """The last validation loss of a run. The loss is None if the run does not validate, and infinite if the loss is not
    finite."""
    losses = [row["loss"] for row in rows_of(run.folder / METRICS) if row["kind"] == "validation"]
    if not losses:
        return None
    return math.inf if losses[-1] is None else losses[-1]


@contextmanager
def reported() -> Iterator[None]:
    """Report a job's errors. A user's mistake is reported in one line and ends the process with status 2. If a run of a
    sweep diverges, the sweep prints one line and continues, and `report_diverged` raises the error at its end.

    A job in another process raises its error, and the command reports this error after all jobs have ended. The
    traceback of a crash is in the job's log."""
    if not runs_elsewhere():
        # Errors are reported inside the job, because Hydra prints its own message about a failed job.
        with one_line_errors():
            try:
                yield
            except Diverged as error:
                if not is_sweep():
                    raise
                values = ",".join(swept_values())
                DIVERGED.append(values)
                if is_main():
                    print(f"{values} diverged: {error}", file=sys.stderr, flush=True)
        return
    quiet_libraries()
    open_streams()
    outlive()
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        # The original exceptions hold configurations that may not be picklable.
        raise UserError(explain(error)) from None
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        if world_size() > 1:
            os._exit(1)  # the process exits at once, as in `reporting`, because other ranks are waiting
        raise


def report_diverged() -> None:
    """Raise UserError with the swept values of the runs that diverged. Call this function after a sweep."""
    if DIVERGED:
        number = len(DIVERGED)
        raise UserError(f"{number} run{'s' * (number > 1)} of the sweep diverged: {'; '.join(DIVERGED)}", shared=True)


def swept_values() -> list[str]:
    """The overrides of the current run whose keys the sweep varies."""
    hydra = HydraConfig.get()
    fixed = hydra.job.config.override_dirname.exclude_keys
    # The last override of a key takes effect.
    last = {override.partition("=")[0]: override for override in hydra.overrides.task}
    return [override for key, override in last.items() if key not in fixed]


def folder_name(overrides: Iterable[str]) -> str:
    """A readable and unique folder name for the swept overrides of a run.

    Characters that shells or file systems do not accept are replaced or removed, and a long name is cut. A changed name
    ends with a hash, so that the values /a/b and /a_b get different folders."""
    full = ",".join(overrides)
    plain = re.sub(r"[^\w=,.+@:~-]+", "_", re.sub(r"""[][{}()"']""", "", full))
    short = plain.encode()[:LONGEST_NAME].decode(errors="ignore")
    if short == full:
        return full
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{plain.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
