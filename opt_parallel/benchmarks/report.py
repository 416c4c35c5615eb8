"""Write the results of the compared trainers as a table, a JSON file and a plot."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from opt_parallel.benchmarks.race import Race, Result
from opt_parallel.config.run import Run
from opt_parallel.report.plots import save_figure
from opt_parallel.runtime.log import aligned
from opt_parallel.storage.atomic import write_text

Row = dict[str, Any]


def rows_of(race: Race, run: Run, world: int) -> list[Row]:
    """One row for each trainer, with the median and range of its rounds, its MFU and memory, and the ratio of our rate
    to the trainer's in each round."""
    rate = statistics.median(race.matmul_flops)
    flops = run.model.flops_per_token(run.data.sequence_length)
    ours = next((result for result in race.results if result.name == "ours" and not result.failure), None)
    return [_row(result, ours, flops / (world * rate)) for result in race.results]


def _row(result: Result, ours: Result | None, mfu_of_a_token: float) -> Row:
    row: Row = dataclasses.asdict(result)
    if result.failure:
        return row
    median = statistics.median(result.tokens_per_second)
    row |= {"median": median, "mfu": median * mfu_of_a_token}
    if ours is not None and result is not ours:
        paired = zip(ours.tokens_per_second, result.tokens_per_second, strict=True)
        ratios = [mine / theirs for mine, theirs in paired]
        row |= {"ours_over_it": statistics.median(ratios), "ours_over_it_range": [min(ratios), max(ratios)]}
        row["our_memory_over_its"] = ours.peak_memory_bytes / result.peak_memory_bytes
    return row


def table(rows: list[Row]) -> str:
    """The rows as a text table."""
    head = ["", "tensor × data", "tokens a step", "tokens/s (range)", "MFU", "peak memory", "first loss"]
    lines = [[*head, "ours ÷ it (range)", "our memory ÷ its"]]
    failed = []
    for row in rows:
        if row["failure"]:
            failed.append(f"{row['title']}: {row['failure']}")
            continue
        low, high = min(row["tokens_per_second"]), max(row["tokens_per_second"])
        cells = [row["title"], f"{row['tensor']} × {row['data']}", f"{row['tokens_a_step']:,}"]
        cells += [f"{row['median']:,.0f} ({low:,.0f}–{high:,.0f})", f"{row['mfu']:.1%}"]
        cells += [f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB", f"{row['first_loss']:.3f}", "", ""]
        if "ours_over_it" in row:
            low, high = row["ours_over_it_range"]
            cells[-2:] = [f"{row['ours_over_it']:.2f} ({low:.2f}–{high:.2f})", f"{row['our_memory_over_its']:.2f}"]
        lines.append(cells)
    return "\n".join([aligned(lines), *failed])


def write(folder: Path, name: str, title: str, setting: Row, rows: list[Row]) -> list[Path]:
    """Write the files `name`.json and `name`.png to `folder`, and return their paths."""
    data, picture = folder / f"{name}.json", folder / f"{name}.png"
    write_text(data, json.dumps({"setting": setting, "results": rows}, indent=1) + "\n")
    draw(picture, f"{title}\n{setting['machine']}", [row for row in rows if not row["failure"]])
    return [data, picture]


def draw(path: Path, title: str, rows: list[Row]) -> None:
    """Plot tokens/s as bars, with the range of the rounds as lines, and peak memory as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.55 * len(rows)), dpi=150, layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    names = [f"{row['title']}\ntensor {row['tensor']} × data {row['data']}" for row in rows]
    colors = ["#6fa8dc" if row["name"] == "ours" else "#b9c4cf" for row in rows]
    medians = [row["median"] for row in rows]
    below = [row["median"] - min(row["tokens_per_second"]) for row in rows]
    above = [max(row["tokens_per_second"]) - row["median"] for row in rows]
    bars = speed.barh(names, medians, color=colors, xerr=[below, above], error_kw={"elinewidth": 1, "capsize": 3})
    speed.bar_label(bars, [f" {median:,.0f}" for median in medians], label_type="center", color="black")
    peaks = [row["peak_memory_bytes"] / 2**30 for row in rows]
    memory.bar_label(memory.barh(names, peaks, color=colors), [f"{peak:.2f}" for peak in peaks], label_type="center")
    speed.set_xlabel("tokens/s of all processes (line: slowest to fastest round)")
    memory.set_xlabel("peak memory of a process, GiB")
    speed.invert_yaxis()
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    save_figure(figure, path)
