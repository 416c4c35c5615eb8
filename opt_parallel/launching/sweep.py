"""What sets the runs of a sweep (Hydra's multirun) apart, and the folders that are named by it."""

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
DIVERGED: list[str] = []  # what sets apart the runs of this process's sweep that diverged
LONGEST_NAME = 200  # bytes; file systems end at 255, and some at less


class RememberSweep(Callback):
    """Keeps which keys the command line gave one value, where every run of the sweep finds it: its process may be
    another one, on another host, whose own command line says nothing."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {override.get_key_element() for override in given if override.is_sweep_override()}
        fixed = [f"'{key}'" for key in dict.fromkeys(each.get_key_element() for each in given) if key not in swept]
        # Hydra composes each run from these; the key is Hydra's own, for names that leave something out
        config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")


def is_sweep() -> bool:
    """Whether the job that Hydra runs is one of a multirun's."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def runs_elsewhere() -> bool:
    """Whether the job runs in a process that the command only waits for, as submitit's do."""
    return is_sweep() and HydraConfig.get().launcher._target_ != BASIC_LAUNCHER


@contextmanager
def reported() -> Iterator[None]:
    """Around a job: its mistakes are one line and status 2. One of several that diverges has a line of its own, and the
    others follow; `report_diverged` ends the sweep.

    Where the command waits for jobs elsewhere, they are handed to it, and it says them once the other jobs have ended;
    so is a crash, whose traceback stays in the job's log."""
    if not runs_elsewhere():
        with one_line_errors():  # here already: Hydra would print its own word about a job that fails
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
        raise UserError(explain(error)) from None  # theirs hold configurations, which may not travel
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        if world_size() > 1:
            os._exit(1)  # at once, as in `reporting`: other ranks wait
        raise


def report_diverged() -> None:
    """After a sweep in this process. Raises: UserError that names the runs which diverged."""
    if DIVERGED:
        number = len(DIVERGED)
        raise UserError(f"{number} run{'s' * (number > 1)} of the sweep diverged: {'; '.join(DIVERGED)}", shared=True)


def swept_values() -> list[str]:
    """The overrides that set this run of a sweep apart from its siblings."""
    hydra = HydraConfig.get()
    fixed = hydra.job.config.override_dirname.exclude_keys
    last = {override.partition("=")[0]: override for override in hydra.overrides.task}  # the last one counts
    return [override for key, override in last.items() if key not in fixed]


def folder_name(overrides: Iterable[str]) -> str:
    """A folder's name for such overrides: legal, readable, another one for others.

    What a shell or a file system takes amiss is replaced or left out, and a long name cut; it then ends with a hash, so
    that /a/b and /a_b do not meet in one folder."""
    whole = ",".join(overrides)
    plain = re.sub(r"[^\w=,.+@:~-]+", "_", re.sub(r"""[][{}()"']""", "", whole))
    short = plain.encode()[:LONGEST_NAME].decode(errors="ignore")
    if short == whole:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{plain.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"
