"""Compose the plan's own settings from the files of configs/cluster/ and the command line, or read one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from opt_parallel.config.compose import CONFIGS, verbatim
from opt_parallel.config.values import check_values
from opt_parallel.planning.settings import ClusterConfig, PlanKeys


def cluster_file(name: str, **changed: Any) -> ClusterConfig:
    """The settings of a file of configs/cluster/, with `changed` values. Unlike `keys_from`, this works while Hydra
    runs a command."""
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "cluster" / f"{name}.yaml"))
    assert isinstance(values, dict)
    return ClusterConfig(**{str(key): value for key, value in values.items()} | changed)


def keys_from(overrides: Sequence[str]) -> PlanKeys:
    """The checked settings. Raises: UserError, and Hydra's and OmegaConf's errors."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("plan", list(overrides))
    values = OmegaConf.to_container(config, resolve=True)
    check_values(values)
    schema = OmegaConf.structured(PlanKeys)
    plan = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(verbatim(values))))
    assert isinstance(plan, PlanKeys)
    return plan
