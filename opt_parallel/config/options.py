"""Parse the options of scripts, and check them for secrets, URLs, unreadable paths and numbers out of range."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from opt_parallel.config.paths import local, reach
from opt_parallel.config.secrets import refuse_secret_name, refuse_secret_value
from opt_parallel.config.values import check_values


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line. `~` is expanded in options of `type=Path`.

    Raises: UserError for a secret, a URL as a path, an existing path that cannot be read, a number that is not finite
    or too large."""
    _refuse_secrets(sys.argv[1:])
    for action in actions_of(parser):
        if action.type is Path:
            action.type = partial(_path, name_of(action))
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        check_values(value, f"--{name.replace('_', '-')}")
    return arguments


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options and positional arguments of a parser and its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from actions_of(verb)


def name_of(action: argparse.Action) -> str:
    """The name of an option as the user types it, or of a positional argument."""
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


def _path(option: str, text: str) -> Path:
    reach(f"{option} ", text)
    return Path(local(f"{option} ", text))


def _refuse_secrets(words: Sequence[str]) -> None:
    """Raise UserError for a secret on the command line, before argparse could print the secret in an error message."""
    option = "the command line"
    for word in words:
        value = word
        if word.startswith("--"):
            option, _, value = word.partition("=")
            refuse_secret_name(option)
        refuse_secret_value(option, value)
