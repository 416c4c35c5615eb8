"""Predictions beside published measurements."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opt_parallel.planning import golden, published
from opt_parallel.planning.memory import memory
from opt_parallel.planning.rows import Cells, Measurement, Refused, Row
from opt_parallel.planning.timing import time_of
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.atomic import write_text

TIMES = ("iter_s", "tok_s_gpu", "tflops_gpu", "hardware_tflops_gpu", "mfu_pct")
UNITS = dict.fromkeys(("peak", "reserved", "allocated", "states", "activations"), (1e9, "GB"))
UNITS |= {"iter_s": (1.0, "s"), "tok_s_gpu": (1.0, "tokens/s"), "tflops_gpu": (1.0, "TFLOP/s")}
UNITS |= {"hardware_tflops_gpu": (1.0, "TFLOP/s"), "mfu_pct": (1.0, "%")}
ALL = "all"
CASE = ("case", "platform")
# The rows that constants were fitted on: of tests/planning/published.csv by id, of golden.csv by the case's beginning.
FITTED = {
    "K1", "K3", "K8", "K10", "K13", "K22", "M1", "M3", "M6", "S1", "S5", "P1", "P7", "P12", "T1", "B1", "B4", "B9",
    "B11", "TT1", "TT4", "TT6", "TT7", "TT10", "TT12", "G1", "F1",
}  # fmt: skip
FITTED_CASES = (
    "gpt3_mcore_te_tp1_pp1_dist",
    "gpt3_mcore_te_tp2_pp2_cp2/",
    "gpt3_mcore_te_tp1_pp4_disable",
    "gpt3_mcore_tp1_pp4/",
)


@dataclass(frozen=True)
class Compared:
    """A predicted beside a measured number."""

    row: Row
    quantity: str
    predicted: float
    measured: float

    @property
    def what(self) -> str:
        return "time" if self.quantity in TIMES else "memory"

    @property
    def fitted(self) -> bool:
        """Whether a constant was fitted on this row."""
        return self.row.id in FITTED or self.row.id.startswith(FITTED_CASES)

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0


def read(path: Path) -> list[Row]:
    """The rows of a file, whose columns commas, semicolons or tabs separate. Raises: UserError if the file cannot be
    read, has other columns, or no rows."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=max(",;\t", key=header.count), restval="")
            cells, names = list(table), {name.strip() for name in table.fieldnames or ()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for kind, needed, name in ((published.row, published.COLUMNS, ("id",)), (golden.row, golden.COLUMNS, CASE)):
        if names >= needed:
            if not cells:
                raise UserError(f"{path} has columns but no rows: add a row for each measurement")
            return [_row(kind, each, name) for each in cells]
    missing = ", ".join(sorted(published.COLUMNS - names))
    raise UserError(f"{path} has no columns {missing}: use the columns that docs/planning-formulas.md lists")


def _row(kind: Callable[[Cells], Row], cells: dict[str | None, str], columns: tuple[str, ...]) -> Row:
    """The row of a line's cells. A line that ends early has empty cells at its end."""
    named = {column.strip(): (text or "").strip() for column, text in cells.items() if column is not None}
    name = "/".join(named[column] for column in columns)
    try:
        if None in cells:
            raise Refused("it has more cells than the first line has columns: quote a cell that contains a separator")
        return kind(named)
    except Refused as reason:
        return Row(name or "?", "", refused=str(reason))


def predicted(row: Row, each: Measurement) -> float:
    """The prediction of one measured number, in its unit."""
    assert row.workload is not None
    assert row.cluster is not None
    if each.quantity in TIMES:
        time = time_of(row.workload, row.cluster)
        rates = {"tok_s_gpu": time.tokens_per_second, "tflops_gpu": time.mfu * time.peak / 1e12}
        rates |= {"mfu_pct": 100 * time.mfu}
        return rates.get(each.quantity, time.step if each.quantity == "iter_s" else time.hfu * time.peak / 1e12)
    found = memory(row.workload, row.cluster)
    states = found.weights + found.gradients + found.masters + found.moments
    values = {
        "peak": found.allocated,
        "reserved": found.allocated + found.reserved,
        "allocated": states + found.buffers,
        "states": states,
        "activations": found.activations,
    }
    return float(values[each.quantity])


def compare(rows: list[Row]) -> list[Compared]:
    """Predictions for all measured numbers of the rows that can be planned."""
    return [
        Compared(row, each.quantity, predicted(row, each), each.value)
        for row in rows
        for each in row.measured
        if row.no_time is None or each.quantity not in TIMES
    ]


def report(path: Path, json_out: Path | None) -> str:
    """The text of `plan.py validate`: predicted beside measured for the rows of a file, and errors by source.

    `json_out` gets a list of {id, quantity, predicted, measured}. Raises: UserError if the file has no such rows, or if
    `json_out` cannot be written."""
    rows = read(path)
    found = compare(rows)
    if json_out is not None:
        values = [
            {"id": each.row.id, "quantity": each.quantity, "predicted": each.predicted, "measured": each.measured}
            for each in found
        ]
        try:
            write_text(json_out, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {json_out}: {error.strerror}") from None
    lines = [_line(each) for each in found]
    refused = [f"{row.id}: not planned: {row.refused}" for row in rows if row.refused]
    refused += [f"{row.id}: its time is not planned: {row.no_time}" for row in rows if row.no_time]
    return "\n".join([*lines, *refused, "", *errors(found)])


def _line(each: Compared) -> str:
    """One comparison: * marks a row that a constant was fitted on."""
    scale, unit = UNITS[each.quantity]
    mark = "*" if each.fitted else " "
    return (
        f"{each.row.id:<24}{mark} {each.quantity:<20} planned {each.predicted / scale:>9.4g} measured "
        f"{each.measured / scale:>9.4g} {unit:<9} {each.error:+.1%}"
    )


def errors(found: list[Compared]) -> list[str]:
    """Mean and worst error by source, of memory and of time, of fitted and of judged rows."""
    lines = [f"{'source':<10} {'what':<8} {'rows':<7} {'number':>6} {'mean':>7} {'worst':>7}  worst row"]
    sources = sorted({each.row.source for each in found})
    for source in [*sources, ALL]:
        for what in ("memory", "time"):
            for fitted in (True, False):
                some = [
                    each
                    for each in found
                    if source in (each.row.source, ALL) and each.what == what and each.fitted is fitted
                ]
                if some:
                    mean, worst = mean_of(some), max(some, key=lambda each: abs(each.error))
                    kind = "fitted" if fitted else "judged"
                    lines.append(
                        f"{source:<10} {what:<8} {kind:<7} {len(some):>6} {mean:>7.1%} {abs(worst.error):>7.1%}  "
                        f"{worst.row.id}"
                    )
    return lines


def mean_of(found: list[Compared]) -> float:
    """The mean of the absolute relative errors."""
    return sum(abs(each.error) for each in found) / len(found)
