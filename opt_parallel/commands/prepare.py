"""Prepare the text of a run in advance: `opt-parallel prepare data.train=…`, with the configuration keys of `train`.

The command builds the token stores that `train` builds for the same arguments, and prints their statistics. A
streamed source is read as far as the run needs it. `verify=true` also reads all token stores and compares their
checksums.
"""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opt_parallel.checkpoint.inherit import start_from_checkpoint, take_special_tokens
from opt_parallel.checkpoint.manifest import read_manifest
from opt_parallel.config.compose import CONFIGS, command, one_line_errors, run_from
from opt_parallel.config.model import require
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.log import aligned

VERIFY = "verify"  # an argument of this command, not a configuration key


def run() -> None:
    with one_line_errors():
        verify = take_verify()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
    def main(config: DictConfig) -> None:
        with one_line_errors():
            prepare_text(config, verify)

    command(main)


def prepare_text(config: DictConfig, verify: bool) -> None:
    """Prepare the text of a composed configuration and print its statistics. `verify` also reads all token stores."""
    start_from_checkpoint(config, HydraConfig.get().overrides.task)
    take_special_tokens(config, HydraConfig.get().overrides.task)
    run = run_from(config)
    from opt_parallel.checkpoint.damage import tokenizer_of  # imports torch
    from opt_parallel.checkpoint.folders import choose
    from opt_parallel.data.prepare import prepare
    from opt_parallel.data.store.statistics import table_of
    from opt_parallel.data.store.store import TokenStore

    resume_from = choose(run.resume, run.folder)
    prepared = prepare(run, tokenizer_of(resume_from))
    stores = {f"data.train ({each.name})": each.store for each in prepared.train if each.stream is None}
    if prepared.validation is not None:
        stores["validation"] = prepared.validation
    opened = {name: TokenStore(folder, run.model.vocab_size) for name, folder in stores.items()}
    if any(source.stream for source in prepared.train):
        from opt_parallel.data.resuming import resumed_clock
        from opt_parallel.data.tasks import fill_streams

        clock = resumed_clock(run, prepared.train, read_manifest(resume_from)) if resume_from else Clock()
        opened |= fill_streams(run, prepared, clock)
    for name in stores:
        print(f"\n{name}\n{aligned(table_of(opened[name]))}")
    print(f"\ntokenizer: {prepared.tokenizer}")
    if verify:
        from opt_parallel.data.store.verify import verify as verified

        for name, store in opened.items():
            print(verified(name, store))


def take_verify() -> bool:
    """Remove the argument `verify=…` from the command line and return its value. Raises: UserError."""
    given = [argument for argument in sys.argv[1:] if argument.partition("=")[0] == VERIFY]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in given]
    value = given[-1].partition("=")[2].lower() if given else "false"
    require(value in ("true", "false"), f"{VERIFY}={value} must be true or false")
    return value == "true"
