"""Prepare the text of a run before it trains: `python scripts/prepare.py data.train=…`, with train.py's own keys.

Makes what `train.py` with the same command line would, and prints what is in it. A stream is filled as far as the run
reads it.
"""

from __future__ import annotations

import os
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from opt_parallel.compose import explain, register_schema, run_from, start_from_checkpoint
from opt_parallel.errors import reporting
from opt_parallel.log import aligned, quiet_libraries

said_in_one_line = partial(reporting, (HydraException, OmegaConfBaseException), explain)


@hydra.main(version_base="1.3", config_path="../configs", config_name="config")
def main(config: DictConfig) -> None:
    with said_in_one_line():
        start_from_checkpoint(config, HydraConfig.get().overrides.task)
        run = run_from(config)
        from opt_parallel.data.prepare import prepare
        from opt_parallel.data.statistics import table_of
        from opt_parallel.data.store import TokenStore

        prepared = prepare(run)
        if any(source.stream for source in prepared.train):
            from opt_parallel.data.tasks import fill_streams  # torch comes with it

            fill_streams(run, prepared)
        stores = {f"data.train ({each.name})": each.store for each in prepared.train if each.stream is None}
        if prepared.validation is not None:
            stores["validation"] = prepared.validation
        for name, folder in stores.items():
            print(f"\n{name}\n{aligned(table_of(TokenStore(folder)))}")
        print(f"\ntokenizer: {prepared.tokenizer}")


if __name__ == "__main__":
    quiet_libraries()
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the errors of composing, too
    with said_in_one_line():
        main()
