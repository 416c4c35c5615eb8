"""Parses the command-line arguments of commands and scripts without running them."""

from __future__ import annotations

import copy
import functools
import sys
from argparse import Action, ArgumentParser, Namespace, _HelpAction, _SubParsersAction
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

import pytest
from command import ROOT
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from opt_parallel.checkpoint.inherit import inherit_for_evaluation, start_from_checkpoint, take_special_tokens
from opt_parallel.config.compose import TEXTS, CheckConfig, register_schema, run_from, to_dict, verbatim
from opt_parallel.config.overrides import checked
from opt_parallel.config.paths import typed_fields
from opt_parallel.config.run import Run
from opt_parallel.launching.submit import LAUNCH_TEXTS, check, composed_run, launch_from, rendered, split_overrides

_register_schema = functools.cache(register_schema)


def run_of(*arguments: str, evaluation: bool = False, configs: Path = ROOT / "configs", tokenizer: bool = False) -> Run:
    """The `Run` for these arguments of `train`, or with `evaluation` for these arguments of `evaluate`.

    With `tokenizer`, the special tokens are also read from the tokenizer, which may be on the hub."""
    overrides = checked(arguments, TEXTS)
    _register_schema()
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
    if evaluation:
        inherit_for_evaluation(config, overrides)
    start_from_checkpoint(config, overrides)
    if tokenizer:
        take_special_tokens(config, overrides)
    return run_from(config)


def mistake_of(work: Callable[[], Any]) -> str:
    """The line that `work` reports before it ends the process. Here, the process continues."""

    def leave(line: str, *_: Any, **__: Any) -> NoReturn:
        raise SystemExit(line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opt_parallel.runtime.errors.leave", leave)
        with pytest.raises(SystemExit) as left:
            work()
    return str(left.value)


def mistake_before_hydra_writes(*arguments: str) -> str:
    """The line that `train` reports for these arguments before Hydra makes a folder."""
    _register_schema()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", checked(arguments, TEXTS), return_hydra_config=True)
    return mistake_of(lambda: CheckConfig().on_run_start(config))


def changed(run: Run, values: Mapping[str, Any]) -> Run:
    """The run with other values of these dotted keys, checked as a file's values are.

    It takes a quarter of the time of `run_of`, because Hydra does not compose."""
    sections = to_dict(run)
    for key, value in values.items():
        *outer, name = key.split(".")
        functools.reduce(dict.__getitem__, outer, sections)[name] = value
    return run_from(OmegaConf.create(verbatim(sections)))


def quick_run_of(*arguments: str) -> Run:
    """The `Run` for these arguments of `train`, in a third of the time. Hydra composes the files of equal groups
    (`model=…`, `task=…`) once, and its function for the other arguments changes a copy."""
    overrides = checked(arguments, TEXTS)
    config = _composed("config", overrides)
    start_from_checkpoint(config, overrides)
    take_special_tokens(config, overrides)
    return run_from(config)


def _composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration that the file `name` of configs/ and the overrides make."""
    groups = tuple(each for each in overrides if _is_group(each.lstrip("+~").partition("=")[0]))
    composed = _composed_groups(name, groups)
    HydraConfig.instance().set_config(composed)
    config = copy.deepcopy(composed)
    with open_dict(config):
        del config["hydra"]
    parsed = OverridesParser.create().parse_overrides([each for each in overrides if each not in groups])
    ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
    return config


def _is_group(key: str) -> bool:
    return key.startswith("hydra") or (ROOT / "configs" / key.partition("@")[0]).is_dir()


@functools.cache
def _composed_groups(name: str, groups: tuple[str, ...]) -> DictConfig:
    _register_schema()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(name, list(groups), return_hydra_config=True)


def path_keys(section: type, prefix: str = "") -> list[str]:
    """The keys of a configuration section whose values are paths."""
    return [key for key, each, _ in typed_fields(section, prefix) if "path" in each.metadata]


def dry(*arguments: str) -> str:
    """The command, batch script or manifests that `opt-parallel submit` would start for these arguments.

    Hydra composes each system's file once, and equal arguments of the run once."""
    ours, theirs = split_overrides(checked(arguments, TEXTS | LAUNCH_TEXTS))
    launch, run = launch_from(_composed("launch", ours)), _composed_run(tuple(theirs))
    check(launch, run)
    return str(rendered(launch, run.run, theirs))


@functools.cache
def _composed_run(overrides: tuple[str, ...]) -> Run:
    return composed_run(ROOT / "configs", overrides)


def load_script(name: str) -> Any:
    """The file SCRIPTS[name], imported as a new module."""
    spec = spec_from_file_location(f"scripts_{name}", SCRIPTS[name])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # because dataclasses look up their module in sys.modules
    spec.loader.exec_module(module)
    return module


def parser_of(name: str) -> ArgumentParser:
    """The argument parser of a command, or the one that a script's function `main` makes."""

    class Made(Exception):
        pass

    def catch(parser: ArgumentParser) -> Namespace:
        raise Made(parser)

    module = load_script(name)
    module.parsed = catch
    try:
        module.main()
    except Made as made:
        return made.args[0]
    raise AssertionError(f"{SCRIPTS[name]} does not read its options with `parsed`")


def options_of(name: str) -> list[tuple[str | None, Action]]:
    """The options and positional arguments of a script, each with the subcommand that it belongs to."""

    def walk(parser: ArgumentParser, verb: str | None) -> Iterator[tuple[str | None, Action]]:
        for action in parser._actions:
            if isinstance(action, _SubParsersAction):
                for inner, below in action.choices.items():
                    yield from walk(below, inner)
            elif not isinstance(action, _HelpAction):
                yield verb, action

    return list(walk(parser_of(name), None))


# The commands and scripts with options. Other scripts are left out, because their function `main` would do its work.
FILES = [*(ROOT / "opt_parallel" / "commands").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
SCRIPTS = {path.stem: path for path in sorted(FILES) if "parsed(" in path.read_text()}
