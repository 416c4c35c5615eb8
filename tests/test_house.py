"""The house: modules import downwards only, stay small, and keep DeepSpeed and torch.distributed in their rooms."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from lower floors, or from other modules of its own room.
FLOORS = [
    ["runtime"],
    ["storage", "config"],
    ["data.ids"],
    ["data.text", "parallel", "report"],
    ["huggingface", "zero", "planning"],
    ["data.encode", "model", "optim", "metaseq"],
    ["data.store", "gradients"],
    ["data.samples"],
    ["data.kinds"],
    ["data.prepare", "engine"],
    ["data.resuming"],
    ["data.tasks", "checkpoint", "validation"],
    ["tools", "launching", "preflight", "planned", "pretrained", "rehearsal"],
    ["run_folder", "start"],
    ["loop", "benchmarks"],
    ["commands"],
    ["completion"],
    ["train", "__main__"],
    [""],  # opt_parallel/__init__.py, which names the classes of `pretrained`
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted([*(ROOT / "opt_parallel").rglob("*.py"), ROOT / "train.py"])
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
# who may import what; everybody else may not
RESERVED = {
    "deepspeed": {"engine", "benchmarks.contenders"},
    "torch.distributed": {"parallel.topology", "parallel.collectives", "checkpoint", "preflight", "rehearsal",
                          "benchmarks"},
    # a mistake in the command line is said before torch is imported, which takes seconds
    "torch": {"parallel", "report.metrics", "report.profiling", "report.trackers", "data.samples", "data.kinds",
              "data.tasks", "model", "optim", "zero", "gradients", "engine", "checkpoint", "validation", "tools",
              "preflight", "pretrained", "start", "loop", "huggingface.names", "huggingface.weights",
              "huggingface.arrays", "huggingface.pickled", "huggingface.folder", "metaseq.findings",
              "metaseq.weights", "benchmarks", "commands.benchmark", "commands.generate", "planned", "rehearsal"},
}  # fmt: skip


def name_of(path: Path) -> str:
    """`parallel.linear` for opt_parallel/parallel/linear.py, `train` for train.py, "" for opt_parallel/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("opt_parallel", "__init__"))


def room_of(name: str) -> str:
    """The folder that a module is in: of `data` the folder below; a module beside the folders is a room of its own."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "data" and rest else first


@functools.cache
def imports_and_functions(source: str) -> tuple[list[str], list[ast.FunctionDef]]:
    """Full dotted names of everything imported, and all functions, at any depth of the file."""
    imports, functions = [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.FunctionDef):
            functions.append(node)
    return imports, functions


def broken_rules(name: str, source: str) -> list[str]:
    """What a module's source does that the house does not allow."""
    imports, functions = imports_and_functions(source)
    room, broken = room_of(name), []
    if name not in ("", "data") and room not in FLOOR_OF:
        broken.append(f"{name} stands on no floor")
    for imported in imports:
        if imported.startswith("opt_parallel."):
            other = room_of(imported.removeprefix("opt_parallel."))
            if other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
                broken.append(f"{name} imports upward or sideways: {imported}")
        for library, allowed in RESERVED.items():
            inside = imported == library or imported.startswith(f"{library}.")
            if inside and not any(name == owner or name.startswith(f"{owner}.") for owner in allowed):
                broken.append(f"{name} may not import {imported}")
    if len(source.splitlines()) > LONGEST_FILE:
        broken.append(f"{name} has {len(source.splitlines())} lines, over {LONGEST_FILE}")
    for function in functions:
        if (length := (function.end_lineno or 0) - function.lineno + 1) > LONGEST_FUNCTION:
            broken.append(f"{name}.{function.name} has {length} lines, over {LONGEST_FUNCTION}")
    return broken


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_keeps_the_rules(path: Path) -> None:
    assert not broken_rules(name_of(path), path.read_text())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model.opt", "from opt_parallel.engine import Engine"),
        ("config.run", "def f():\n    from opt_parallel.parallel.shard import Shard"),
        ("data.text.files", "from opt_parallel.data.store.store import Part"),
        ("loop", "import deepspeed"),
        ("model.opt", "from torch import distributed"),
        ("config.run", "import torch"),
        ("attic", "x = 1"),
        ("optim", "x = 1\n" * 401),
        ("optim", "def f():\n" + "    x = 1\n" * 60),
    ],
)
def test_the_guard_sees_a_broken_rule(name: str, source: str) -> None:
    assert broken_rules(name, source)


def test_no_circle_inside_a_folder() -> None:
    edges = {name_of(path): imports_and_functions(path.read_text())[0] for path in MODULES}
    graph = {}
    for name, imports in edges.items():
        dotted = " ".join(f"{imported}." for imported in imports)
        graph[name] = {other for other in edges if other and other != name and f"opt_parallel.{other}." in dotted}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"modules import each other in a circle: {sorted(graph)}"


def test_a_test_file_runs_alone() -> None:
    """What several test files use is in tests/support, which is on the path whichever of them runs."""
    shared = re.compile(r"^\s*(from|import) test_", re.MULTILINE)
    assert not [path for path in (ROOT / "tests").rglob("test_*.py") if shared.search(path.read_text())]
