"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Clock:
    """Optimizer steps done, samples consumed and tokens seen, padding left out, since the run began.

    What follows is for a run whose sources changed on the way, see `data/resuming.py`. `mixed`: the sample of the run
    from which on they are mixed as they are now; `taken`: of each source, the samples that it gave before; `orders`:
    what a source's order is drawn by where that is not its name."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    mixed: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    orders: dict[str, str] = field(default_factory=dict)

    @classmethod
    def saved(cls, values: dict[str, Any]) -> Clock:
        """What a checkpoint says; earlier versions wrote less, and later ones may write more."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def after(self, samples: int, tokens: int) -> Clock:
        """The clock one optimizer step later."""
        return replace(self, step=self.step + 1, samples=self.samples + samples, tokens=self.tokens + tokens)
