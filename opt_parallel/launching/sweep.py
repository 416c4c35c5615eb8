"""Runs of a sweep (Hydra's multirun): their swept values, folder names and errors."""

from __future__ import annotations

import hashlib
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
from opt_parallel.runtime.errors import Diverged, UserError
from opt_parallel.runtime.log import quiet_libraries
from opt_parallel.runtime.process import is_main, world_size
from opt_parallel.runtime.terminal import open_streams, outlive

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
DIVERGED: list[str] = []  # swept values of this process's runs that diverged
LONGEST_NAME = 200  # bytes; most file systems allow 255, some less


class RememberSweep(Callback):
    """Stores the keys that are not swept in Hydra's configuration, since jobs may run on other hosts without the
    command line."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {override.get_key_element() for override in given if override.is_sweep_override()}
        fixed = [f"'{key}'" for key in dict.fromkeys(each.get_key_element() for each in given) if key not in swept]
        # Hydra composes each run with these overrides; the key is Hydra's own, for `override_dirname`
        config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")


def is_sweep() -> bool:
    """Whether Hydra's present job belongs to a multirun."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def runs_elsewhere() -> bool:
    """Whether the job runs in another process than the command, as with submitit."""
    return is_sweep() and HydraConfig.get().launcher._target_ != BASIC_LAUNCHER


@contextmanager
def reported() -> Iterator[None]:
    """Around a job: a user's mistake is one line and status 2. A run of a sweep that diverges prints a line and the
    sweep continues; `report_diverged` ends it.

    A job in another process raises its error, which the command reports after all jobs have ended. The traceback of a
    crash is in the job's log."""
    if not runs_elsewhere():
        with one_line_errors():  # in the job: Hydra would print its own message about a job that fails
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
        raise UserError(explain(error)) from None  # the original exceptions hold configurations and may not pickle
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        if world_size() > 1:
            os._exit(1)  # at once, as in `reporting`: other ranks are waiting
        raise


def report_diverged() -> None:
    """Call after a sweep in this process. Raises: UserError that names the runs that diverged."""
    if DIVERGED:
        number = len(DIVERGED)
        raise UserError(f"{number} run{'s' * (number > 1)} of the sweep diverged: {'; '.join(DIVERGED)}", shared=True)


def swept_values() -> list[str]:
    """The overrides of this run that the sweep varies."""
    hydra = HydraConfig.get()
    fixed = hydra.job.config.override_dirname.exclude_keys
    last = {override.partition("=")[0]: override for override in hydra.overrides.task}  # the last of a key wins
    return [override for key, override in last.items() if key not in fixed]


def folder_name(overrides: Iterable[str]) -> str:
    """A readable folder name for swept overrides, unique to them.

    Characters that shells or file systems do not accept are replaced or dropped, and a long name is cut. A changed name
    ends with a hash, so that /a/b and /a_b get different folders."""
    full = ",".join(overrides)
    plain = re.sub(r"[^\w=,.+@:~-]+", "_", re.sub(r"""[][{}()"']""", "", full))
    short = plain.encode()[:LONGEST_NAME].decode(errors="ignore")
    if short == full:
        return full
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{plain.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
