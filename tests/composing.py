"""What the commands make of their arguments, short of running them."""

from __future__ import annotations

from pathlib import Path

from command import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from opt_parallel.compose import TEXTS, judge_as_trained, register_schema, run_from, start_from_checkpoint
from opt_parallel.config import Run
from opt_parallel.launching.submit import LAUNCH_TEXTS, check, composed, divide, rendered
from opt_parallel.overrides import checked


def run_of(*arguments: str, judge: bool = False, configs: Path = ROOT / "configs") -> Run:
    """The run of a command line of train.py, or with `judge` of scripts/evaluate.py."""
    overrides = checked(arguments, TEXTS)
    register_schema()
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
    if judge:
        judge_as_trained(config, overrides)
    start_from_checkpoint(config, overrides)
    return run_from(config)


def dry(*arguments: str) -> str:
    """What launch/submit.py would start."""
    ours, theirs = divide(checked(arguments, TEXTS | LAUNCH_TEXTS))
    launch, run = composed(ROOT / "configs", ours, theirs)
    check(launch, run)
    return str(rendered(launch, run, ROOT, theirs))
