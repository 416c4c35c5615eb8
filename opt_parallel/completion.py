"""Shell completion of commands, their options, and Hydra's groups and keys.

`opt-parallel --shell-completion SHELL` prints a script for the shell. The script calls `opt-parallel --complete LINE`,
which prints the words that can stand at the end of the line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module

from opt_parallel.runtime.errors import UserError, reporting

SHELLS = {
    "bash": """\
# eval "$(opt-parallel --shell-completion bash)" in ~/.bashrc
_opt_parallel() {
    local line="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=($(compgen -W "$(opt-parallel --complete "$line" 2>/dev/null)" -- "${line##* }"))
    [[ "${COMPREPLY[*]}" != *[=./] ]] || compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -F _opt_parallel opt-parallel
""",
    "zsh": """\
# eval "$(opt-parallel --shell-completion zsh)" in ~/.zshrc, after compinit
_opt_parallel() {
    local -a found
    found=(${=$(opt-parallel --complete "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)})
    (( $#found )) || { _files; return }
    compadd -S '' -- ${(M)found:#*[=./]}
    compadd -- ${found:#*[=./]}
}
compdef _opt_parallel opt-parallel
""",
    "fish": """\
# opt-parallel --shell-completion fish | source, in ~/.config/fish/config.fish
complete -c opt-parallel -a '(opt-parallel --complete (commandline -cp) 2>/dev/null | string split " ")'
""",
}
CONFIGURED = ("train", "prepare", "preflight", "evaluate", "submit", "plan")  # commands with Hydra's keys
FLAGS = ["--help", "--cfg", "--config-dir", "--multirun"]


def answer(words: Sequence[str], commands: Collection[str]) -> None:
    """Print the answer to `--shell-completion SHELL` or `--complete LINE`, the words of the command line."""
    with reporting():
        value = words[1] if len(words) > 1 else ""
        if words[0] == "--complete":
            print_candidates(value, commands)
        elif value in SHELLS:
            print(SHELLS[value], end="")
        else:
            what = f"{value} is not a shell" if value else "is given no shell"
            raise UserError(f"--shell-completion {what}: choose {', '.join(SHELLS)}")


def print_candidates(line: str, commands: Collection[str]) -> None:
    """Print the words that can stand in place of the last word of `line`, separated by blanks."""
    _, *words = line.split(" ")
    *before, current = [*(word for word in words[:-1] if word), *words[-1:]] or [""]
    if not before:
        found = [*commands, "--help", "--version", "--shell-completion"]
    elif before[0] == "--shell-completion":
        found = list(SHELLS)
    elif before[0] not in commands:
        found = []
    elif before[0] not in CONFIGURED or (before[0] == "plan" and current.startswith("-")):
        module = import_module(f"opt_parallel.commands.{before[0]}")
        found = options(module.parser(), before[1:], current)
    elif current.startswith("-"):
        found = FLAGS
    elif current.startswith("launch.") and before[0] == "submit":
        found = launch_keys()
    elif current.startswith("cluster.") and before[0] == "plan":
        found = cluster_keys()
    elif values := values_of(current.partition("=")[0]):
        found = values
    else:
        print_keys([*before[1:], current])
        return
    print(" ".join(word for word in found if word.startswith(current)))


def options(parser: argparse.ArgumentParser, before: Sequence[str], current: str) -> list[str]:
    """The subcommands and options that can follow the words `before`, or the values of the option before."""
    for word in before:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                parser = action.choices[word]
    for action in parser._actions:
        if before and before[-1] in action.option_strings and action.nargs != 0:
            return [str(choice) for choice in action.choices or ()]
    positional = [action for action in parser._actions if not action.option_strings]
    if positional and not current.startswith("-"):
        return [str(choice) for action in positional for choice in action.choices or ()]
    return [option for action in parser._actions for option in action.option_strings]


def launch_keys() -> list[str]:
    """The keys of all launch systems."""
    from dataclasses import fields

    from opt_parallel.launching.settings import SECTIONS

    names = (field.name for section in SECTIONS.values() for field in fields(section))
    return [f"launch.{name}=" for name in dict.fromkeys(names) if name != "system"]


def cluster_keys() -> list[str]:
    """The keys of a cluster."""
    from dataclasses import fields

    from opt_parallel.planning.settings import ClusterConfig

    return [f"cluster.{field.name}=" for field in fields(ClusterConfig)]


def values_of(name: str) -> list[str]:
    """`name=value` for each value of a key that takes one of a few words, and nothing for other keys."""
    from opt_parallel.config.reference import keys

    words = next((key.values.split(", ") for key in keys() if key.name == name), [])
    return (
        []
        if {"integer", "number", "text", "list", "text or list"} & set(words)
        else [f"{name}={word}" for word in words]
    )


def print_keys(words: Sequence[str]) -> None:
    """Print Hydra's completions of the groups and keys of `train`."""
    from opt_parallel.commands.train import run

    os.environ["COMP_LINE"] = " ".join(["opt-parallel", *words])
    sys.argv = ["opt-parallel train", "-sc", "query=bash"]
    run()
