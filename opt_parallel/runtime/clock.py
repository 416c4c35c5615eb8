"""A run's position, counted in steps, samples and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Clock:
    """The numbers of optimizer steps, samples and tokens (without padding) since the run's start.

    The other fields are set only if the run's data sources changed on a restart, see `data/resuming.py`. `mixed` is the
    sample position at which the present sources and weights took effect. `taken` maps each source to the number of its
    samples before the position `mixed`. `orders` maps a source to the key that seeds its shuffling, if that key is not
    the source's name."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    mixed: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    orders: dict[str, str] = field(default_factory=dict)

    @classmethod
    def saved(cls, values: dict[str, Any]) -> Clock:
        """The clock stored in a checkpoint. Missing keys get their defaults and unknown keys are ignored, because other
        versions of this package wrote the checkpoint with other keys."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def after(self, samples: int, tokens: int) -> Clock:
        """The clock after one more optimizer step."""
        return replace(self, step=self.step + 1, samples=self.samples + samples, tokens=self.tokens + tokens)
