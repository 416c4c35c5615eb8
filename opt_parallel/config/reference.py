"""List all configuration keys with their values, default and explanation, for `--help` and docs/configuration.md.

The explanation of a key is the comment above its dataclass field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from opt_parallel.config.run import Run


@dataclass(frozen=True)
class Key:
    """A configuration key. `name` is the full name, such as `zero.stage`. `values` and `default` are written as a user
    types them."""

    name: str
    values: str
    default: str
    explanation: str


def keys(section: type = Run, prefix: str = "") -> Iterator[Key]:
    """All configuration keys of a section and its subsections, in the order of definition."""
    hints, comments = typing.get_type_hints(section), comments_of(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        name = prefix + field.metadata.get("key", field.name)
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from keys(kind, f"{name}.")
        else:
            default = field.default_factory() if callable(field.default_factory) else field.default
            if isinstance(default, dict):  # batch is a dict, since a field cannot have the name `global`
                explained = dict(part.split(": ", 1) for part in comments[field.name].split("; "))
                yield from (
                    Key(f"{name}.{each}", "integer", str(value), explained[each]) for each, value in default.items()
                )
            else:
                yield Key(name, _values(kind), _typed(default), comments.get(field.name, ""))


def comments_of(section: type) -> dict[str, str]:
    """The comment above each field of a dataclass, with its lines joined."""
    lines = textwrap.dedent(inspect.getsource(section)).splitlines()
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    comments = {}
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            first = statement.lineno - 1
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            texts = [line.strip().removeprefix("#").strip() for line in lines[first : statement.lineno - 1]]
            comments[statement.target.id] = " ".join(texts)
    return comments


def _values(kind: Any) -> str:
    parts = typing.get_args(kind)
    if parts and typing.get_origin(kind) not in (list, dict, tuple):
        return ", ".join(_values(part) for part in parts)
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(each.value) for each in kind)
    names = {int: "integer", float: "number", bool: "true, false", str: "text"}
    return "list" if typing.get_origin(kind) is list else names.get(kind, "text or list")


def _typed(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(_typed, value))}]" if isinstance(value, list) else str(value)


def markdown() -> str:
    """The text of docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "All keys, as in `opt-parallel train --help`. `make docs` writes this page from comments in `opt_parallel/`.",
        "Defaults are those of the dataclasses; files in `configs/` may set others.",
    ]
    group = None
    for key in keys():
        head, _, _ = key.name.rpartition(".")
        if head != group:
            group = head
            lines += ["", f"## {head or 'the run'}", "", "| key | values | default | |", "|---|---|---|---|"]
        lines.append(f"| `{key.name}` | {key.values} | `{key.default}` | {key.explanation} |".replace("| `` |", "| |"))
    return "\n".join(lines) + "\n"


def hydra_help() -> str:
    """The text of configs/hydra/help/keys.yaml, which `opt-parallel train --help` prints."""
    width = max(len(f"{key.name}={key.default}") for key in keys() if len(key.default) < 12)
    lines = [
        "opt-parallel ${hydra.job.name} model=opt-125m data.train=/data/text steps=1000 …",
        "",
        "Groups and their files in configs/, chosen as in task=finetune:",
        "",
        "$APP_CONFIG_GROUPS",
        "Keys with the dataclasses' defaults; with `--cfg job`, the command prints the values of its arguments:",
        "",
        *(f"{key.name + '=' + key.default:{width}}  {key.explanation}" for key in keys()),
        "",
        "-m runs every combination of comma-separated values. --config-dir DIR adds files of your own, such as "
        "DIR/experiment/mine.yaml for experiment=mine. More: README.md, docs/configuration.md",
    ]
    head = "# Written by make docs from the comments in opt_parallel/.\napp_name: opt-parallel\ntemplate: |-\n"
    return head + "".join(f"  {line}\n" if line else "\n" for line in lines)


PAGES = {"docs/configuration.md": markdown, "configs/hydra/help/keys.yaml": hydra_help}
