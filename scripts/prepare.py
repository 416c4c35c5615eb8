"""Prepare the text of a run before it trains: `python scripts/prepare.py data.train=…`, with train.py's own keys.

Makes what `train.py` with the same command line would, and prints what is in it. A stream is filled as far as the run
reads it.
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opt_parallel.compose import command, run_from, said_in_one_line, start_from_checkpoint
from opt_parallel.log import aligned


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
    command(main)
