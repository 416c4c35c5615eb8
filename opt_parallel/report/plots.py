"""Plot the losses of one or several runs, and the confusion matrix of a classifier."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt_parallel.runtime.terminal import plain
from opt_parallel.storage.atomic import new_file
from opt_parallel.storage.rows import Row

MOST_NAMED = 40  # Maximum number of labels whose names are shown in a confusion matrix; more names would overlap.
LONGEST_TITLE, LONGEST_LABEL = 60, 30  # Maximum number of characters; plotting thousands of characters takes minutes.
SMOOTH_FROM = 100  # Minimum number of rows of a curve that is smoothed.
# Seven colours for colour-blind readers (Okabe & Ito 2008, without yellow, which is weak on white). Further curves
# repeat the colours in other line styles.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STROKES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
MARKERS = "osD^v<>phdXP"
MOST_RAW = 4  # maximum number of runs for which unsmoothed losses are also plotted


@dataclass(frozen=True)
class Curve:
    """The losses of a run, for training and validation. Each pair holds the positions on the x axis and the losses."""

    label: str
    training: tuple[list[int], list[float]]
    validation: tuple[list[int], list[float]]


def draw(path: Path, title: str, rows: list[Row], unigram_entropy: float | None, unit: str = "token") -> None:
    """Write a plot of a run's losses over steps. A loss is a mean over tokens or examples, which `unit` names."""
    from matplotlib.ticker import MaxNLocator

    figure = figure_with(figsize=(8, 4.8), dpi=150)
    figure.subplots_adjust(left=0.11, right=0.96, top=0.89, bottom=0.12)  # A constrained layout draws twice.
    axes = figure.add_subplot(
        xlabel="step", ylabel=f"loss (nats per {unit})" if unit == "token" else f"loss per {unit}"
    )
    steps, losses = losses_of(rows, "train")
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, losses, color="#1f5f99", linewidth=1.4, label="training")
    else:
        axes.plot(steps, losses, color="#a9c8e4", linewidth=0.8, label="training")
        axes.plot(steps, smoothed(losses), color="#1f5f99", linewidth=1.8, label="training, smoothed")
    if any(row["kind"] == "validation" for row in rows):
        axes.plot(*losses_of(rows, "validation"), "o-", color="#d1600f", markeredgecolor="white", label="validation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#777777", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set_title(short(title), loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def draw_curves(path: Path, title: str, curves: Sequence[Curve], axis: str, unit: str | None) -> None:
    """Write a plot of several runs' losses over `axis` (steps, tokens). `unit` names what a loss is averaged over, or
    is None if this differs between the runs."""
    save_figure(figure_of(title, curves, axis, unit), path)


def figure_of(title: str, curves: Sequence[Curve], axis: str, unit: str | None) -> Any:
    """A figure of the training losses of several runs. If a run has validation losses, the figure shows them in a
    second panel on the same scale."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    panels = 1 + any(curve.validation[0] for curve in curves)
    width = 6 if panels == 1 else 10
    longest = max(len(short(curve.label)) for curve in curves) + 8  # the legend's line sample is 8 characters wide
    columns = max(1, min(12 * width // longest, 4, (len(curves) + 1) // 2))
    height = 4.2 + 0.21 * -(-len(curves) // columns)
    figure = figure_with(figsize=(width, height), dpi=150, layout="constrained")
    both = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
    handles = []
    for number, curve in enumerate(curves):
        way = {"color": COLORS[number % len(COLORS)], "linestyle": STROKES[number // len(COLORS) % len(STROKES)]}
        steps, losses = curve.training
        if len(steps) >= SMOOTH_FROM:
            if len(curves) <= MOST_RAW:
                both[0].plot(steps, losses, color=way["color"], linewidth=0.5, alpha=0.15)
            losses = smoothed(losses)
        both[0].plot(steps, losses, linewidth=1.6, **way)
        if curve.validation[0]:
            way |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 5.5, "markeredgecolor": "white"}
            both[1].plot(*curve.validation, linewidth=1.4, **way)
        handles.append(Line2D([], [], linewidth=1.6, label=short(curve.label), **way))
    long = any(len(curve.training[0]) >= SMOOTH_FROM for curve in curves)
    for axes, name in zip(both, ("training, smoothed" if long else "training", "validation"), strict=False):
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel(axis)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # the axis shows 200k, 1.5G
        axes.margins(x=0.02)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel({"token": "loss (nats per token)", None: "loss"}.get(unit, f"loss per {unit}"))
    limits = _limits(curves)
    if limits is not None:
        both[0].set_ylim(*limits)
    figure.suptitle(short(title), x=0.01, ha="left", fontweight="bold")
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=3)
    return figure


def _limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits of the loss axis, from the lowest loss to the highest loss after the first twentieth of each run, in which
    losses fall fast. The limits are None if no loss is finite. The curve of a run that diverges leaves the plot."""
    lowest, highest = [], []
    for curve in curves:
        for steps, losses in (curve.training, curve.validation):
            drawn = smoothed(losses) if len(steps) >= SMOOTH_FROM else losses
            finite = [loss for loss in drawn if math.isfinite(loss)]
            if finite:
                lowest.append(min(finite))
                highest.append(min(finite[0], finite[len(finite) // 20]))
    if not lowest:
        return None
    low, high = min(lowest), max(lowest + highest)
    margin = 0.05 * max(high - low, 1e-3)
    return low - margin, high + margin


def draw_confusion(path: Path, title: str, labels: Sequence[str], confusion: np.ndarray) -> None:
    """Write a plot of a confusion matrix (N, N) whose rows are the true labels. Colours show shares of each row. With
    at most `MOST_NAMED` labels, the plot also shows names and counts."""
    number, labels = len(labels), [short(label, LONGEST_LABEL) for label in labels]
    size = min(16.0, 3.2 + 0.5 * number)
    figure = figure_with(figsize=(size + 1, size), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="decided", ylabel="true")
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true label", shrink=0.8)
    if number <= MOST_NAMED:
        axes.set_xticks(range(number), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(number), labels)
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_title(short(title), loc="left", fontweight="bold")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the path's suffix, or as png if the path has no suffix. Raises: OSError;
    ValueError for an unknown suffix."""
    with warnings.catch_warnings(), new_file(path) as file:
        warnings.filterwarnings("ignore", "Glyph")  # matplotlib draws boxes for characters that the font lacks
        figure.savefig(file, format=path.suffix[1:] or "png")


def short(name: str, longest: int = LONGEST_TITLE) -> str:
    name = plain(name)
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[1 - half :]}"


def figure_with(**size: Any) -> Any:
    """A matplotlib figure without pyplot, which needs no display and is garbage-collected."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # $ in names of runs and labels is ordinary text
    return Figure(**size)


def perplexity_of(loss: float) -> float:
    """The perplexity exp(loss), or infinity if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def losses_of(rows: list[Row], kind: str) -> tuple[list[int], list[float]]:
    """The steps and losses of all metric rows of a kind, which is train or validation. A loss that is not finite
    becomes NaN, which plots show as a gap."""
    chosen = [row for row in rows if row["kind"] == kind]
    return [row["step"] for row in chosen], [math.nan if row["loss"] is None else row["loss"] for row in chosen]


def smoothed(losses: list[float]) -> list[float]:
    """Centred moving means over a twentieth of the curve. The window is narrower at the start of the curve and
    one-sided at its end."""
    half_widths = [min(i, len(losses) // 40) for i in range(len(losses))]
    return [statistics.fmean(losses[i - half : i + half + 1]) for i, half in enumerate(half_widths)]
