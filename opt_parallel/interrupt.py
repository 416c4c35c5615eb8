"""Ctrl-C and a launcher's SIGTERM, turned into a question the loop asks between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_PRESS = 2.0  # seconds: one Ctrl-C reaches a rank twice, from the terminal and from its launcher


class Interrupt:
    """Whether this process was asked to stop; a second request, a little later, stops it at once."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator[Interrupt]:
        """Take note of SIGINT and SIGTERM while the context lasts."""
        interrupt = cls()
        before = {number: signal.signal(number, interrupt._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield interrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since > SAME_PRESS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._since = True, now
