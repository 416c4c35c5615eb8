"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Optimizer steps done, samples consumed and tokens seen, padding left out, since the run began."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, samples: int, tokens: int) -> Clock:
        """The clock one optimizer step later."""
        return Clock(self.step + 1, self.samples + samples, self.tokens + tokens)
