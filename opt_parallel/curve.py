"""The pictures of a run: its losses, and what a classifier confuses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]  # a line of metrics.jsonl
MOST_NAMED = 40  # labels of a confusion matrix; the names of more overlap
SMOOTH_FROM = 100  # rows; a shorter curve is read as it is


def draw(path: Path, title: str, rows: list[Row], unigram_entropy: float | None, unit: str = "token") -> None:
    """Write the picture of the losses over the steps; `unit` is what a loss is of."""
    from matplotlib.figure import Figure  # no pyplot: no display asked for, no figure left behind
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel=f"loss (nats per {unit})" if unit == "token" else f"loss per {unit}"
    )
    steps, losses = losses_of(rows, "train")
    if len(steps) < SMOOTH_FROM:
        axes.plot(steps, losses, color="#1f5f99", linewidth=1.4, label="training")
    else:
        axes.plot(steps, losses, color="#a9c8e4", linewidth=0.8, label="training")
        axes.plot(steps, _smoothed(losses), color="#1f5f99", linewidth=1.8, label="training, smoothed")
    if any(row["kind"] == "validation" for row in rows):
        axes.plot(*losses_of(rows, "validation"), "o-", color="#d1600f", markeredgecolor="white", label="validation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#777777", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def draw_confusion(path: Path, title: str, labels: Sequence[str], confusion: np.ndarray) -> None:
    """Write the picture of a confusion matrix (N, N): the share of each true label, a row, that each decision got, and
    the number of examples where there is room for it."""
    from matplotlib.figure import Figure

    number = len(labels)
    size = min(16.0, 3.2 + 0.5 * number)
    figure = Figure(figsize=(size + 1, size), dpi=150, layout="constrained")
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
    axes.set_title(title, loc="left", fontweight="bold")
    figure.savefig(path)


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def losses_of(rows: list[Row], kind: str) -> tuple[list[int], list[float]]:
    """Steps and losses of all rows of a kind; NaN, a gap in the picture, for a loss that was not finite."""
    chosen = [row for row in rows if row["kind"] == kind]
    return [row["step"] for row in chosen], [math.nan if row["loss"] is None else row["loss"] for row in chosen]


def _smoothed(losses: list[float]) -> list[float]:
    """Means over a twentieth of the curve, centred so that the line does not lag; narrower at the steep beginning,
    one-sided at the flat end."""
    reaches = [min(i, len(losses) // 40) for i in range(len(losses))]
    return [statistics.fmean(losses[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]
