"""Prepare the text of a run before it trains: `python scripts/prepare.py data.train=…`, with train.py's own keys.

Makes what `train.py` with the same command line would, and prints what is in it. A stream is filled as far as the run
reads it.
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opt_parallel.clock import Clock
from opt_parallel.compose import command, run_from, said_in_one_line, start_from_checkpoint
from opt_parallel.log import aligned
from opt_parallel.manifest import read_manifest


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
            from opt_parallel.checkpoint.whole import choose
            from opt_parallel.data.resuming import go_on
            from opt_parallel.data.tasks import fill_streams  # torch comes with it

            begun = choose(run)
            clock = go_on(run, prepared.train, read_manifest(begun)) if begun else Clock()
            fill_streams(run, prepared, clock)
        stores = {f"data.train ({each.name})": each.store for each in prepared.train if each.stream is None}
        if prepared.validation is not None:
            stores["validation"] = prepared.validation
        for name, folder in stores.items():
            print(f"\n{name}\n{aligned(table_of(TokenStore(folder)))}")
        print(f"\ntokenizer: {prepared.tokenizer}")


if __name__ == "__main__":
    command(main)
