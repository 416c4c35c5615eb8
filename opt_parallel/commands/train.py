"""Train an OPT model: `opt-parallel train model=opt-125m data.train=…`, as one process or under a launcher."""

from __future__ import annotations

import math
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from opt_parallel.checkpoint.inherit import start_from_checkpoint, take_special_tokens
from opt_parallel.config.compose import CONFIGS, command, run_from, take
from opt_parallel.config.run import Run
from opt_parallel.launching.sweep import (
    check_sweep,
    folder_name,
    is_sweep,
    minimised,
    report_diverged,
    reported,
    swept_values,
)
from opt_parallel.runtime.process import set_ranks, world_size


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def main(config: DictConfig) -> float | None:
    """Train one run from its composed configuration. Hydra's multirun calls this function for each combination of
    values. A sweeper minimises the result, which is infinite for a run that diverges."""
    set_ranks()  # submitit starts a sweep's job in this function, not in `command`
    status: int = 0
    loss: float | None = math.inf
    with reported():
        start_from_checkpoint(config, HydraConfig.get().overrides.task)
        take_special_tokens(config, HydraConfig.get().overrides.task)
        if is_sweep():
            with open_dict(config):
                take(config, "run.dir", f"{config.run.dir}/{folder_name(swept_values())}")
        run = run_from(config)
        run.check_world(run.rehearse or world_size())
        if run.rehearse:
            rehearse(run)
            return None
        if is_sweep():
            check_sweep(run)

        from opt_parallel.loop import train  # imported late, since importing torch takes seconds

        status = train(run)
        loss = minimised(run) if is_sweep() else None
    if status:
        sys.exit(status)
    return loss


def rehearse(run: Run) -> None:
    """Print the rehearsal of one of `run.rehearse` ranks."""
    from opt_parallel.benchmarks.runs import in_bf16
    from opt_parallel.rehearsal.report import text

    print(text(in_bf16(run), run.rehearse))


def run_or_sweep() -> None:
    """Train the run, or all runs of a sweep."""
    main()
    report_diverged()


def run() -> None:
    command(run_or_sweep)
