"""Check hosts, devices, network, disk and data before a long run, with the configuration keys and the launcher of
`train`.

torchrun --nproc-per-node 8 -m opt_parallel preflight model=opt-13b parallel.tensor=8 data.train=/data/text

`train` does the same checks before step 1. This command takes seconds, because it prepares no text and loads no
checkpoint.
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opt_parallel.checkpoint.inherit import start_from_checkpoint, take_special_tokens
from opt_parallel.config.compose import CONFIGS, command, one_line_errors, run_from
from opt_parallel.runtime.log import say
from opt_parallel.runtime.process import world_size


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def main(config: DictConfig) -> None:
    with one_line_errors():
        start_from_checkpoint(config, HydraConfig.get().overrides.task)
        take_special_tokens(config, HydraConfig.get().overrides.task)
        run = run_from(config)
        run.check_world(world_size())
        from opt_parallel.checkpoint.folders import choose, precision_of
        from opt_parallel.parallel.precision import choose_precision
        from opt_parallel.parallel.topology import Topology
        from opt_parallel.preflight import check_same, make_run_folder, preflight  # slow import of torch

        with Topology.open(run.parallel.tensor, run.parallel.allow_cross_node) as topology:
            check_same(run, topology)
            topology.together(lambda: make_run_folder(run.folder))
            before = topology.together(lambda: precision_of(choose(run.resume, run.folder)))
            precision, why = choose_precision(run.precision.name, run.zero.stage, topology, before)
            run = run.in_precision(precision)
            say(f"precision={run.precision.name.value}" + (f" ({why})" if why else ""))
            for line in preflight(run, topology):
                say(line)


def run() -> None:
    command(main)
