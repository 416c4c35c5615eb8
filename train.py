"""Train an OPT model: `python train.py model=opt-125m data.train=…`, alone or under a launcher."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from opt_parallel.config import register_schema, run_from
from opt_parallel.errors import guarded
from opt_parallel.log import quiet_libraries


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    """One run out of one composed configuration; a multirun calls this once a combination."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        with open_dict(config):
            config.run.dir = os.path.relpath(HydraConfig.get().runtime.output_dir)
    run = run_from(config)

    from opt_parallel.loop import train  # only now: torch and DeepSpeed take seconds

    status = train(run)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    quiet_libraries()
    register_schema()
    if os.environ.setdefault("HYDRA_FULL_ERROR", "1") == "1":  # hand us the error instead of printing its own way
        guarded(main, expected=(HydraException, OmegaConfBaseException))
    main()
