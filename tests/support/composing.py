"""Parses the commands' arguments without running the commands."""

from __future__ import annotations

import sys
from argparse import Action, ArgumentParser, Namespace, _HelpAction, _SubParsersAction
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from command import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from opt_parallel.checkpoint.inherit import inherit_for_evaluation, start_from_checkpoint, take_special_tokens
from opt_parallel.config.compose import TEXTS, register_schema, run_from
from opt_parallel.config.overrides import checked
from opt_parallel.config.paths import typed_fields
from opt_parallel.config.run import Run
from opt_parallel.launching.submit import LAUNCH_TEXTS, check, composed, rendered, split_overrides


def run_of(*arguments: str, evaluation: bool = False, configs: Path = ROOT / "configs", tokenizer: bool = False) -> Run:
    """The run of a command line of train.py, or with `evaluation` of scripts/evaluate.py. `tokenizer`: also read the
    special tokens from the tokenizer, which may be on the hub."""
    overrides = checked(arguments, TEXTS)
    register_schema()
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


def path_keys(section: type, prefix: str = "") -> list[str]:
    """The keys of a section that hold paths."""
    return [key for key, each, _ in typed_fields(section, prefix) if "path" in each.metadata]


def dry(*arguments: str) -> str:
    """The command, script or manifests that launch/submit.py would start."""
    ours, theirs = split_overrides(checked(arguments, TEXTS | LAUNCH_TEXTS))
    launch, run = composed(ROOT / "configs", ours, theirs)
    check(launch, run)
    return str(rendered(launch, run, ROOT, theirs))


def load_script(name: str) -> Any:
    """A file of scripts/ as a module."""
    spec = spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look the module up there
    spec.loader.exec_module(module)
    return module


def parser_of(name: str) -> ArgumentParser:
    """The parser of a script's `main`."""

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
    raise AssertionError(f"scripts/{name}.py does not read its options with `parsed`")


def options_of(name: str) -> list[tuple[str | None, Action]]:
    """A script's options and positional arguments, each with its subcommand."""

    def walk(parser: ArgumentParser, verb: str | None) -> Iterator[tuple[str | None, Action]]:
        for action in parser._actions:
            if isinstance(action, _SubParsersAction):
                for inner, below in action.choices.items():
                    yield from walk(below, inner)
            elif not isinstance(action, _HelpAction):
                yield verb, action

    return list(walk(parser_of(name), None))


# scripts with options; the `main` of others would do its work
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "parsed(" in path.read_text())
