"""A run's position: steps, samples, tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Clock:
    """Optimizer steps done, samples consumed and tokens seen (without padding) since the run's start.

    The other fields serve a run whose sources changed, see `data/resuming.py`. `mixed`: the position from which the
    present mixture holds; `taken`: samples that each source gave before it; `orders`: the key that seeds a source's
    order, where it is not the source's name."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    mixed: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    orders: dict[str, str] = field(default_factory=dict)

    @classmethod
    def saved(cls, values: dict[str, Any]) -> Clock:
        """The clock of a checkpoint. Earlier versions wrote fewer keys, later ones may write more."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def after(self, samples: int, tokens: int) -> Clock:
        """The clock one optimizer step later."""
        return replace(self, step=self.step + 1, samples=self.samples + samples, tokens=self.tokens + tokens)
