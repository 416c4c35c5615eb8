"""Draw a plan: memory by kind against the device's limit, and tokens per second on more devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_parallel.report.plots import COLORS, figure_with, save_figure, short

# Colours for colour-blind readers (Okabe & Ito 2008), then greys
KINDS = ("#0072B2", "#56B4E9", "#009E73", "#8CD0B8", "#D55E00", "#E69F00", "#CC79A7", "#E7BFD5", "#BBBBBB", "#888888")


@dataclass(frozen=True)
class Bar:
    """A setting with its memory in GiB by kind."""

    label: str
    kinds: dict[str, float]


@dataclass(frozen=True)
class Line:
    """Tokens per second over the number of devices."""

    label: str
    devices: Sequence[int]
    rates: Sequence[float]


def draw_plan(path: Path, title: str, bars: Sequence[Bar], limit: float, lines: Sequence[Line], here: int) -> None:
    """Write a picture of two panels. `limit` are the GiB of a device, and `here` is the planned number of devices."""
    from matplotlib.ticker import EngFormatter

    figure = figure_with(figsize=(11, 4.8), dpi=150, layout="constrained")
    memory, speed = figure.subplots(1, 2, width_ratios=(1.25, 1))
    names = [name for name in bars[0].kinds if any(bar.kinds[name] >= 0.002 * limit for bar in bars)]
    bottoms = [0.0] * len(bars)
    for name, color in zip(bars[0].kinds, KINDS, strict=False):
        if name in names:
            heights = [bar.kinds[name] for bar in bars]
            memory.bar(range(len(bars)), heights, bottom=bottoms, color=color, width=0.7, label=name)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    memory.axhline(limit, color="#000000", linestyle="--", linewidth=1.2, label=f"the device, {limit:.1f}")
    for place, top in enumerate(bottoms):
        memory.annotate(f"{top:.1f}", (place, top), ha="center", va="bottom", fontsize=8)
    memory.set_xticks(range(len(bars)), [short(bar.label, 40) for bar in bars], rotation=20, ha="right", fontsize=8)
    memory.set_ylabel("GiB on the fullest rank")
    memory.set_ylim(0, 1.12 * max(limit, *bottoms))
    memory.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for line, style, color in zip(lines, ("o-", "s--"), COLORS, strict=False):
        speed.plot(line.devices, line.rates, style, color=color, markersize=4, label=line.label)
    speed.axvline(here, color="#777777", linewidth=1, linestyle=":")
    speed.set_xscale("log", base=2)
    speed.set_yscale("log")
    ticks = sorted({devices for line in lines for devices in line.devices})
    speed.set_xticks(ticks, [f"{number:,}" for number in ticks], rotation=45, fontsize=8)
    speed.minorticks_off()
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    speed.set_xlabel("devices")
    speed.set_ylabel("tokens per second")
    speed.legend(frameon=False)
    for axes in (memory, speed):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
    save_figure(figure, path)
