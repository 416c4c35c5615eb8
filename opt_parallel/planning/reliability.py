"""Failures to expect on many devices, the interval between checkpoints that loses least, and the time that remains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opt_parallel.planning.plan import DAY, Plan
from opt_parallel.planning.saving import saving
from opt_parallel.planning.settings import ClusterConfig


@dataclass(frozen=True)
class Published:
    """A published count of failures: on `devices` devices in `days` days."""

    source: str
    failures: int
    days: float
    devices: int

    @property
    def per_1000_days(self) -> float:
        """Failures in 1,000 days of a device."""
        return 1000 * self.failures / self.days / self.devices


# Unexpected interruptions in 54 days of Llama 3's pre-training (Dubey et al. 2024, section 3.3.4). 35 manual restarts
# and an estimate of 70 automatic ones in two months of OPT-175B's training (Zhang et al. 2022, section 2.5).
PUBLISHED = (
    Published("Llama 3 405B, 16,384 H100", 419, 54, 16_384),
    Published("OPT-175B, 992 A100", 105, 60, 992),
)


@dataclass(frozen=True)
class Reliability:
    """`between` are the seconds between two failures of any device, `failures` those during all steps. `stall` is the
    time for which a save stops training, and `writing` the time until it is complete. `every` is the number of steps
    between two saves that loses least, and `effective` the share of the time for steps that no failure undoes."""

    between: float
    failures: float
    stall: float
    writing: float
    restart: float
    every: int
    effective: float


def best_interval(stall: float, between: float) -> float:
    """The seconds between two saves that lose least (Daly 2006, equation 37, which refines Young 1974)."""
    if stall >= 2 * between:
        return between
    ratio = math.sqrt(stall / (2 * between))
    return math.sqrt(2 * stall * between) * (1 + ratio / 3 + ratio**2 / 9) - stall


def lost(interval: float, stall: float, between: float, restart: float) -> float:
    """Seconds that are lost for a second of training: the saves, and for each failure a restart and on average half of
    the steps since the last save."""
    return stall / interval + (interval / 2 + stall + restart) / between


def reliability(plan: Plan, config: ClusterConfig) -> Reliability | None:
    """The failures of a run and what they cost, or None if nothing fails."""
    if not config.failures:
        return None
    between = DAY * 1000 / config.failures / plan.cluster.devices
    step = plan.time.step - plan.time.checkpoint
    save = saving(plan.workload, plan.cluster, plan.run.checkpoint.asynchronous)
    interval = max(best_interval(save.stall, between), save.writing, step)
    every = max(1, round(interval / step))
    loss = lost(every * step, save.stall, between, config.restart)
    return Reliability(between, plan.seconds / between, save.stall, save.writing, config.restart, every, 1 / (1 + loss))
