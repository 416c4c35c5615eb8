"""Compare the settings, the progress and the losses of several runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from opt_parallel.config.task import Task
from opt_parallel.config.values import flat
from opt_parallel.report.plots import SMOOTH_FROM, Curve, draw_curves, losses_of, smoothed
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.log import aligned
from opt_parallel.storage.rows import METRICS, Row, describe_damaged, read_rows

CONFIG, STATE = "config.yaml", "state"
INNER = {"checkpoints", "export", "logs", "wandb"}  # Subfolders of a run's folder that contain no runs.
OWN = {"run.dir", "run.name"}  # Keys that always differ between runs.
MOST_COLUMNS = 6  # Maximum number of settings in the table of runs; more settings get their own table.
MOST_IN_LABEL = 3  # Maximum number of settings in a legend.
LONGEST_CELL = 36  # Maximum number of characters.
NONE = "—"
AXES = ("step", "samples", "tokens")


@dataclass(frozen=True)
class Record:
    """A run that was read from its folder. `settings` maps the dotted keys of `config.yaml` to values, and `rows` are
    the rows of `metrics.jsonl`."""

    folder: Path
    settings: dict[str, Any]
    rows: list[Row]
    diverged: bool

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read a run from its folder. Raises: UserError if a file cannot be read."""
        return cls(folder, _settings(folder / CONFIG), _rows(folder / METRICS), diverged(folder))

    @cached_property
    def training(self) -> tuple[list[int], list[float]]:
        return losses_of(self.rows, "train")

    @cached_property
    def validation(self) -> tuple[list[int], list[float]]:
        return losses_of(self.rows, "validation")

    @property
    def last_training(self) -> float:
        """The training loss at the end of the plotted curve. A long run has a mean over its last steps, a short run its
        last loss, and a run without losses NaN."""
        losses = self.training[1]
        return (smoothed(losses) if len(losses) >= SMOOTH_FROM else losses or [math.nan])[-1]

    def reached(self, what: str) -> int:
        """The value of `step`, `samples` or `tokens` in the last row that has this value."""
        return next((row[what] for row in reversed(self.rows) if what in row), 0)

    def curve(self, label: str, axis: str) -> Curve:
        """The losses over `axis`, which is one of AXES. The row of a validation has only a step, so the other axes use
        the value of the preceding training row."""
        if axis == "step":
            return Curve(label, self.training, self.validation)
        position, at = 0, {}
        for row in self.rows:
            position = row.get(axis, position)
            at[row["step"]] = position
        (steps, losses), (held_out, others) = self.training, self.validation
        return Curve(label, ([at[step] for step in steps], losses), ([at[step] for step in held_out], others))


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of all runs in `paths` and their subfolders, each listed once.

    Raises: UserError if one of `paths` contains no run."""
    if not paths:
        raise UserError("no run is named: name folders of runs, or a folder that contains runs, such as a sweep's")
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: name a run's folder, or a folder that contains runs")
        runs = list(_runs_in(path))
        if not runs:
            raise UserError(f"{path} contains no {METRICS}, nor do its subfolders: name a run's folder")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(path: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(path):
        inner = INNER if METRICS in files else set()
        folders[:] = sorted(folder for folder in folders if folder not in inner and not folder.startswith("."))
        if METRICS in files:
            yield Path(parent)


def read_runs(paths: Sequence[Path]) -> tuple[list[Record], list[Path]]:
    """The runs of `find_runs` that have rows of metrics, and the folders of runs that have no rows yet.

    Raises: UserError as `find_runs`, if a run without rows is itself one of `paths`, or if no run has rows."""
    records = [Record.read(folder) for folder in find_runs(paths)]
    empty = [record.folder for record in records if not record.rows]
    named = next((folder for folder in empty if folder in paths), None)
    if named is not None or len(empty) == len(records):
        folder = named or empty[0]
        if diverged(folder):
            raise UserError(f"{folder} diverged in its first step, and {METRICS} has no rows: leave it out")
        raise UserError(f"{folder / METRICS} has no rows yet: wait for the first steps, or leave it out")
    return [record for record in records if record.rows], empty


def diverged(folder: Path) -> bool:
    """Whether a run diverged, that is, ended with values that are not finite, according to its state file."""
    try:
        return (folder / STATE).read_bytes().strip() == b"diverged"
    except OSError:
        return False


def _rows(path: Path) -> list[Row]:
    """All rows of a file of metrics, without an incomplete last row."""
    try:
        rows, damaged = read_rows(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if damaged:
        raise UserError(f"{describe_damaged(path, damaged)}: restore the file, or remove these lines")
    return rows


def _settings(path: Path) -> dict[str, Any]:
    """The configuration in a YAML file as a dictionary with dotted keys. If the file is missing, as in a folder into
    which only the metrics were copied, the configuration is empty."""
    if not path.exists():
        return {}
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a run's configuration: restore the file, or remove it")
    return flat(values)


def differing(records: Sequence[Record]) -> list[str]:
    """The keys whose values differ between the runs that have a configuration, in the order of the configuration."""
    known = [record.settings for record in records if record.settings]
    keys = dict.fromkeys(key for settings in known for key in settings if key not in OWN)
    return [key for key in keys if any(settings.get(key) != known[0].get(key) for settings in known)]


def cells(records: Sequence[Record], key: str) -> list[str]:
    """The value of a setting in each run as text, without a long prefix that all values share."""
    texts = [_as_text(record.settings[key]) if key in record.settings else NONE for record in records]
    if max(map(len, texts)) > LONGEST_CELL:
        given = [text for text in texts if text != NONE]
        pairs = zip(min(given), max(given), strict=False)
        shared = next((index for index, (a, b) in enumerate(pairs) if a != b), 0)
        texts = [text if text == NONE or shared < 4 else f"…{text[shared:]}" for text in texts]
    return [text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 1]}…" for text in texts]


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")


def labels(records: Sequence[Record]) -> list[str]:
    """A label for each run, with its number in the table and its differing settings, or with its folder if many
    settings differ."""
    keys = differing(records)
    short = [key.rpartition(".")[2] for key in keys]
    short = [word if short.count(word) == 1 else key for key, word in zip(keys, short, strict=True)]
    columns = [[f"{word}={cell}" for cell in cells(records, key)] for key, word in zip(keys, short, strict=True)]
    texts = [", ".join(values) for values in zip(*columns, strict=True)] if columns else []
    if len(keys) > MOST_IN_LABEL or len(set(texts)) < len(records) or not all(record.settings for record in records):
        texts = [name if len(name) <= 60 else f"{name[:59]}…" for name in names(records)]
    return [f"{number}: {text}" for number, text in enumerate(texts, start=1)]


def names(records: Sequence[Record]) -> list[str]:
    """The folders of the runs, relative to the folder that contains all of them."""
    folders = [record.folder for record in records]
    root = root_of(records)
    return [str(folder.relative_to(root)) if folder != root else folder.resolve().name for folder in folders]


def root_of(records: Sequence[Record]) -> Path:
    """The deepest folder that contains all runs, or the parent folder of a single run."""
    if len(records) == 1:
        return records[0].folder.parent
    return Path(os.path.commonpath([record.folder for record in records]))


def table(records: Sequence[Record]) -> str:
    """A table with one row for each run, which shows progress, losses, a classifier's last metrics, differing settings
    and the folder. If many settings differ, a second table has one row for each setting."""
    keys = differing(records)
    figures = list(dict.fromkeys(name for record in records for name in _figures(record)))
    shown = keys if len(keys) <= MOST_COLUMNS else []
    columns = [cells(records, key) for key in shown]
    lines = [["run", "step", "tokens", "training", "validation", "lowest, at step", *figures, *shown, "folder"]]
    for number, (record, name) in enumerate(zip(records, names(records), strict=True)):
        steps = record.settings.get("steps")
        last = _figures(record)
        lines.append(
            [
                str(number + 1),
                f"{record.reached('step'):,}" + (f" of {steps:,}" if steps else "") + ", diverged" * record.diverged,
                f"{record.reached('tokens'):,}",
                _loss(record.last_training),
                _loss(record.validation[1][-1]) if record.validation[1] else NONE,
                _lowest(record),
                *(_loss(last[figure]) if figure in last else NONE for figure in figures),
                *(column[number] for column in columns),
                name,
            ]
        )
    text = f"{aligned(lines)}\n\ntraining: {_what_training_is(records)}; folders below {root_of(records)}"
    if keys and not shown:
        numbers = [str(number) for number in range(1, len(records) + 1)]
        text += f"\n\n{aligned([['differs', *numbers], *([key, *cells(records, key)] for key in keys)])}"
    return text


def _what_training_is(records: Sequence[Record]) -> str:
    if all(len(record.training[0]) < SMOOTH_FROM for record in records):
        return "the last step's loss"
    return f"the mean loss of the last fortieth of the steps, or the last loss of a run below {SMOOTH_FROM} steps"


def _figures(record: Record) -> dict[str, float | None]:
    """The metrics of a classifier's last validation, without the loss."""
    last = next((row for row in reversed(record.rows) if row["kind"] == "validation"), {})
    return {name: value for name, value in last.items() if name not in ("kind", "step", "loss", "perplexity")}


def _lowest(record: Record) -> str:
    steps, losses = record.validation
    finite = [(loss, step) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not finite:
        return NONE
    loss, step = min(finite)
    return f"{loss:.4f}, {step:,}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def draw(path: Path, records: Sequence[Record], axis: str) -> None:
    """Write a plot of the runs' losses over one of AXES. Raises: UserError if the file cannot be written."""
    curves = [record.curve(label, axis) for record, label in zip(records, labels(records), strict=True)]
    tasks = {record.settings.get("task.name", "pretrain") for record in records}
    units = {Task[name].unit for name in tasks if name in Task.__members__}
    unit = units.pop() if len(units) == 1 else None
    title = root_of(records).name if len(records) > 1 else records[0].folder.name
    try:
        draw_curves(path, title, curves, axis, unit)
    except (OSError, ValueError) as error:  # ValueError means an unknown suffix
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(
            f"--output {path} cannot be written: {reason}; name another file, such as compare.png"
        ) from error
