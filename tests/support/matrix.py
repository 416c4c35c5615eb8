"""Records which features the tests run together. `make matrix` writes docs/matrix.md from a run of all tests.

The features are read from the configurations that tests pass to worker processes, and from the checkpoints of
commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import ROOT
from omegaconf import OmegaConf

from opt_parallel.config.compose import run_from, to_dict
from opt_parallel.config.run import Run
from opt_parallel.runtime.errors import UserError

PAGE = ROOT / "docs" / "matrix.md"
TESTED, REFUSED, ABSENT, SAME = "✓", "–", "·", " "
Values = dict[str, Any]  # a run's configuration in plain values


@dataclass(frozen=True)
class Feature:
    """A feature of runs. Features with the same `axis` exclude each other, unless the axis is "".

    `settings` are the settings that turn the feature on. `on(values, data)` says whether a run with the configuration
    `values` and the data-parallel degree `data` has the feature."""

    name: str
    axis: str
    settings: tuple[str, ...]
    on: Callable[[Values, int], bool]


def _setting(axis: str, key: str, *choices: Any) -> list[Feature]:
    section, name = key.split(".")
    return [
        Feature(f"{axis} {choice}".strip(), key, (f"{key}={choice}",), lambda v, _, c=choice: v[section][name] == c)
        for choice in choices
    ]


FEATURES = [
    Feature("tensor 1", "tensor", ("parallel.tensor=1",), lambda values, _: values["parallel"]["tensor"] == 1),
    Feature("tensor 2, 4", "tensor", ("parallel.tensor=2",), lambda values, _: values["parallel"]["tensor"] > 1),
    Feature("data 1", "data", (), lambda _, data: data == 1),
    Feature("data 2, 4", "data", (), lambda _, data: data > 1),
    *_setting("ZeRO", "zero.stage", 0, 1, 2, 3),
    Feature("CPU offload", "", ("zero.offload=cpu",), lambda values, _: values["zero"]["offload"] == "cpu"),
    *_setting("", "precision.name", "fp32", "bf16", "fp16"),
    *(
        Feature(
            f"recomputation {mode}", "recomputation", (f"activation_checkpointing={mode}",),
            lambda v, _, mode=mode: v["activation_checkpointing"] == mode,
        )
        for mode in ("selective", "full", "offload")
    ),
    Feature("LayerDrop", "", ("model.layerdrop=0.1",), lambda values, _: values["model"]["layerdrop"] > 0),
    Feature(
        "350m style", "", ("model.do_layer_norm_before=false", "model.word_embed_proj_dim=32"),
        lambda values, _: not values["model"]["do_layer_norm_before"],
    ),
    Feature("LoRA", "", ("task.lora.rank=4", "init_from=x"), lambda values, _: values["task"]["lora"]["rank"] > 0),
    *_setting("", "task.name", "pretrain", "finetune", "classify"),
]  # fmt: skip

ran: set[frozenset[str]] = set()


def record(run: Run, processes: int) -> None:
    """Record that a test runs `run` on this number of processes."""
    _record(to_dict(run), processes // run.parallel.tensor)


def record_checkpoints(folder: Path) -> None:
    """Record the features with which the checkpoints under `folder` were trained."""
    for path in folder.rglob("checkpoints/step-*/manifest.json"):
        try:
            manifest = json.loads(path.read_bytes())
            _record(manifest["config"], manifest["layout"]["data"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a test has damaged this checkpoint


def _record(values: Values, data: int) -> None:
    ran.add(frozenset(feature.name for feature in FEATURES if feature.on(values, data)))


def is_refused(settings: Iterable[str]) -> bool:
    """Whether a run with only these settings is refused with an error."""
    base = {"model": {"num_attention_heads": 4, "hidden_size": 64, "ffn_dim": 256}, "data": {"train": "x"}}
    try:
        run_from(OmegaConf.merge(OmegaConf.structured(Run), base, OmegaConf.from_dotlist(list(settings))))
    except UserError:
        return True
    return False


def mark(one: Feature, other: Feature) -> str:
    if one == other or (one.axis and one.axis == other.axis):
        return SAME
    if any({one.name, other.name} <= names for names in ran):
        return TESTED
    return REFUSED if is_refused([*one.settings, *other.settings]) else ABSENT


def page() -> str:
    """The matrix in Markdown. Only half of the matrix is written, because it is symmetric."""
    lines = [
        "# What works with what", "",
        f"Pairs of features that the tests run together. {TESTED} tested; {REFUSED} refused, and a line says why;",
        f"{ABSENT} allowed, but no test runs the two together.", "",
        "`make matrix` writes this page from a run of the suite.", "",
        "| | " + " | ".join(feature.name for feature in FEATURES[:-1]) + " |",
        "|---" * len(FEATURES) + "|",
    ]  # fmt: skip
    for number, row in enumerate(FEATURES[1:], 1):
        cells = [mark(row, column) if index < number else SAME for index, column in enumerate(FEATURES[:-1])]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
