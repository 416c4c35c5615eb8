"""Convert Hydra's composed configuration to a `Run` and back, and report Hydra's errors in one line."""

from __future__ import annotations

import copy
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from omegaconf.resolvers import oc
from yaml import YAMLError

from opt_parallel.config.overrides import checked
from opt_parallel.config.paths import absolute, change_paths, local, reach, refuse_breaks, text_keys
from opt_parallel.config.run import Run
from opt_parallel.config.secrets import looks_secret, masked, refuse_secret_value
from opt_parallel.config.values import check_values
from opt_parallel.runtime.errors import UserError, one_line, reporting
from opt_parallel.runtime.log import quiet_libraries
from opt_parallel.runtime.process import set_ranks
from opt_parallel.runtime.terminal import outlive

# the repository's folder `configs`, which is also a part of the package
CONFIGS = (Path(__file__).parents[1] / "configs").resolve()
PATHS_OF_HYDRA = ("hydra.run.dir", "hydra.output_subdir", "hydra.sweep.dir", "hydra.sweep.subdir")
# values that exist only if a package is installed
PLUGINS = {
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
}
TEXTS = {*text_keys(Run), *PATHS_OF_HYDRA}


def command(main: Callable[[], None]) -> None:
    """Run `main`, a function decorated with `hydra.main`, with the arguments of the command line. A user's mistake is
    reported in one line and ends the process with status 2. A closed standard output does not end the process."""
    with one_line_errors():
        outlive()
        set_ranks()
        quiet_libraries()
        register_schema()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises configuration errors instead of printing them.
        sys.argv[1:] = checked(sys.argv[1:], TEXTS)  # Overrides are checked before Hydra writes them to a file.
        main()


class CheckConfig(Callback):
    """A Hydra callback that checks the composed configuration before Hydra creates folders and writes a multirun's
    configuration."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with one_line_errors():  # Hydra would turn an exception into a warning
            check_values(OmegaConf.to_container(config))
            # The default of run.name is read from HydraConfig.
            HydraConfig.instance().set_config(copy.deepcopy(config))
            for key in PATHS_OF_HYDRA:
                name = str(OmegaConf.select(config, key))
                if (path := local(f"{key}=", name)) != name:
                    raise UserError(f"{key}={name}: Hydra does not expand ~: write {key}={path}")
                reach(f"{key}=", name)

    on_multirun_start = on_run_start


def _from_environment(name: str, *default: Any) -> Any:
    """The value of `${oc.env:NAME}`. Secrets are refused, because the configuration is written to the run's folder and
    sent to experiment trackers."""
    if looks_secret(name):
        raise UserError(
            f"${{oc.env:{name}}} looks like a secret, and a run's configuration is written to files: leave it out, "
            "because the library that needs it reads the environment itself"
        )
    value = oc.env(name, *default)
    refuse_secret_value(f"${{oc.env:{name}}}", str(value))
    return value


OmegaConf.register_new_resolver("oc.env", _from_environment, replace=True)


def verbatim(value: Any) -> Any:
    """Plain values with all text escaped, so that OmegaConf interpolates no text."""
    if isinstance(value, dict):
        return {key: verbatim(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [verbatim(inner) for inner in value]
    return re.sub(r"(\\*)(\$\{)", r"\1\1\\\2", value) if isinstance(value, str) else value


def take(config: DictConfig, key: str, value: Any) -> None:
    """Set a key of the configuration to a value from a file, without interpolation. Use this function for all text that
    the user did not type.

    Raises: UserError for the text `???`, which means a missing value to OmegaConf."""
    if MISSING in (value if isinstance(value, (list, tuple)) else [value]):
        raise UserError(f"{key}: {MISSING!r} means a missing value in a configuration: change it in the checkpoint")
    OmegaConf.update(config, key, verbatim(value))


def register_schema() -> None:
    """Register `Run` with Hydra under the name `schema`, which is first in the defaults list of
    `configs/config.yaml`."""
    ConfigStore.instance().store(name="schema", node=Run)


def run_from(config: DictConfig) -> Run:
    """The composed configuration as a checked, immutable `Run`.

    Raises: UserError, and OmegaConf's errors."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(
            f"{missing[0]}={MISSING} means a missing value in a configuration: give it one, or leave it out"
        )
    values: Any = OmegaConf.to_container(config, resolve=True)
    check_values(values)
    refuse_breaks("run.name=", str(values["run"]["name"]))
    change_paths(values, Run, local)
    plain = OmegaConf.create(verbatim(values))
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), plain))  # `merge` refuses new keys (`+key=…`)
    assert isinstance(run, Run)
    return run


def explain(error: BaseException) -> str:
    """A Hydra or OmegaConf error as a message of one line with the key and a remedy. Secrets are masked."""
    return masked(_explained(error))


def _explained(error: BaseException) -> str:
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if plugin := PLUGINS.get(f"{group}={choice}"):
            return f"{group}={choice} is a plugin of Hydra that is not installed: pip install {plugin}"
        return f"{group}={choice} does not exist: choose {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        why = one_line(Exception(str(error.__cause__ or error).partition("See https")[0]))
        example = '\'key=["a=b", "größe"]\''
        return f"{error.override} does not follow Hydra's grammar ({why}): quote each text in it, such as {example}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and isinstance(cause.parent_node, DictConfig):
        siblings = [str(key) for key in cause.parent_node]
        full_key = str(cause.full_key)
        close = difflib.get_close_matches(str(cause.key), siblings, n=1)
        meant = f"did you mean {full_key.removesuffix(str(cause.key))}{close[0]}?" if close else ""
        return f"{full_key} does not exist: {meant or 'there are ' + ', '.join(siblings)}"
    key = f"{cause.full_key}: " if isinstance(cause, OmegaConfBaseException) and cause.full_key else ""
    return f"{key}{_wrapped_user_error(error) or one_line(cause)}"


def _wrapped_user_error(error: BaseException | None) -> UserError | None:
    """The UserError inside an OmegaConf error, if a resolver of this package raised it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report errors as `reporting` does, and those of Hydra, OmegaConf and YAML as the user's mistakes."""
    with reporting((HydraException, OmegaConfBaseException), explain):
        try:
            yield
        except (
            ValueError,
            RecursionError,
            YAMLError,
        ) as error:  # YAML's parser raises all three
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if (
                    frame.f_code.co_name == "load_config" and "full_path" in frame.f_locals
                ):  # Hydra's function that reads YAML files
                    where, why = frame.f_locals["full_path"], masked(one_line(error))
                    raise UserError(f"{where} cannot be read as YAML ({why:.300}): correct it") from error
            raise


def to_yaml(run: Run) -> str:
    """The result of `recorded` as YAML, with text escaped so that Hydra reads back the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(verbatim(recorded(run))))


def recorded(run: Run) -> dict[str, Any]:
    """The result of `to_dict` with absolute paths, as written to the run's folder."""
    values = to_dict(run)
    change_paths(values, Run, absolute)
    return values


def to_dict(run: Run) -> dict[str, Any]:
    """The resolved configuration as nested dictionaries, with enums by name."""
    return {each.name: _plain(getattr(run, each.name)) for each in fields(run)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value
