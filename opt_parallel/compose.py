"""Hydra's and OmegaConf's side of the configuration: composed YAML in, `Run` out, and back."""

from __future__ import annotations

import difflib
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from opt_parallel.config import Run
from opt_parallel.errors import one_line


def register_schema() -> None:
    """Make the types known to Hydra as `schema`, first in the defaults of `configs/config.yaml`."""
    ConfigStore.instance().store(name="schema", node=Run)


def run_from(config: DictConfig) -> Run:
    """The composed configuration as a checked, sealed `Run`.

    Raises: `UserError`, OmegaConf's errors."""
    plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), plain))  # refuses what `+key=…` added
    assert isinstance(run, Run)
    return run


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's errors in one line that names the key and the way out."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} does not exist: choose {', '.join(error.options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and isinstance(cause.parent_node, DictConfig):
        siblings = [str(key) for key in cause.parent_node]
        full_key = str(cause.full_key)
        close = difflib.get_close_matches(str(cause.key), siblings, n=1)
        meant = f"did you mean {full_key.removesuffix(str(cause.key))}{close[0]}?" if close else ""
        return f"{full_key} does not exist: {meant or 'there are ' + ', '.join(siblings)}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {one_line(cause)}"
    return one_line(error)


def to_yaml(run: Run) -> str:
    """The resolved configuration, as it is written beside the run."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def to_dict(run: Run) -> dict[str, Any]:
    """The resolved configuration in plain values (enums by name)."""
    plain = OmegaConf.to_container(OmegaConf.structured(run), resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
