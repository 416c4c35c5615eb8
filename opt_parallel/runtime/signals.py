"""Ctrl-C, a terminal's SIGHUP and SIGQUIT, a launcher's SIGTERM and SIGUSR1, and a launcher's own end, turned into a
question the loop asks between two steps.

The signals are read by a thread, through Python's wake-up descriptor: the main thread may hang in a collective, and a
second signal must end it all the same.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from opt_parallel.runtime import process
from opt_parallel.runtime.errors import INTERRUPTED, STOPPED, leave
from opt_parallel.runtime.log import say

STATUS = {
    signal.SIGINT: INTERRUPTED,
    **dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT), STOPPED),
}
LOOK = 1.0  # seconds between two looks whether the launcher is gone
SAME_REQUEST = 5.0  # seconds: one request reaches a rank twice, from a terminal or Slurm and from its launcher


class Interrupt:
    """Whether this process was asked to stop. `status` is what it should then end with; 0: nobody asked.

    Until `patient` is set, and at a second request some seconds after the first, it ends at once, after `last_words`;
    without them on a SIGTERM to one of several ranks, which launchers send after another rank has crashed, too."""

    def __init__(self) -> None:
        self.status = 0
        self.patient = False
        self.last_words: Callable[[], None] = lambda: None
        self._since = 0.0
        self._ignored = False

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator[Interrupt]:
        """Take note of the signals while the context lasts."""
        interrupt = cls()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # first: no signal is lost in between
        before = {number: signal.signal(number, lambda *_: None) for number in STATUS if not _kept_off(number)}
        threading.Thread(target=interrupt._listen, args=(reader,), daemon=True).start()
        try:
            yield interrupt
        finally:
            signal.set_wakeup_fd(earlier)
            for number, handler in before.items():
                if not interrupt._ignored:
                    signal.signal(number, handler)
            os.close(writer)

    def ignore(self) -> None:
        """Let no signal change any more what this process ends with: launchers send one to all as soon as one ends."""
        self._ignored = True
        ignore_all()

    def _listen(self, reader: int) -> None:
        signals = select.poll()
        signals.register(reader, select.POLLIN)
        while True:
            if not signals.poll(LOOK * 1000):
                if not self.status and process.launcher_is_gone():
                    say(f"warning: the launcher, process {process.PARENT}, is gone: this run stops as on SIGTERM")
                    self._note(signal.SIGTERM)
            elif numbers := os.read(reader, 64):
                for number in numbers:
                    if number in STATUS:
                        self._note(signal.Signals(number))
            else:
                break
        os.close(reader)

    def _note(self, number: signal.Signals) -> None:
        status, now = STATUS[number], time.monotonic()
        if not self.patient or (self.status and now - self._since > SAME_REQUEST):
            if number != signal.SIGTERM or process.world_size() == 1:
                with suppress(OSError):  # this thread must live
                    self.last_words()
            leave("interrupted", status, patience=0.0)
        if not self.status:
            self.status, self._since = status, now


def ignore_all() -> None:
    """In a process whose parent decides when it ends: terminals and batch systems signal all processes of a run."""
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)


def _kept_off(number: signal.Signals) -> bool:
    """Whether `nohup` keeps a signal off. Shells have SIGINT and SIGQUIT ignored, too, in what a script starts with &;
    who sends one to that process by its number means it."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
