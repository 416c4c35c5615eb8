"""Signals (SIGINT, SIGTERM, SIGUSR1, SIGHUP, SIGQUIT) and the launcher's exit, as a status that the loop reads after
each step.

A thread reads the signals through Python's wake-up descriptor: the main thread may hang in a collective, and a second
signal must still end the process.
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
CHECK_EVERY = 1.0  # seconds between two checks that the launcher is alive
SAME_REQUEST = 5.0  # seconds; within them a second signal is the same request, forwarded by the launcher


class Interrupt:
    """Whether this process was asked to stop. `status`: its exit status in that case; 0: not asked.

    Before `can_save` is set, and on a second request more than `SAME_REQUEST` seconds after the first, the process
    calls `last_words` and exits at once. On SIGTERM with several ranks it does not call `last_words`: launchers also
    send SIGTERM after another rank crashed."""

    def __init__(self) -> None:
        self.status = 0
        self.can_save = False
        self.last_words: Callable[[], None] = lambda: None
        self._since = 0.0
        self._ignored = False

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator[Interrupt]:
        """Receive the signals while the context lasts."""
        interrupt = cls()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # before the handlers: no signal is lost
        before = {number: signal.signal(number, lambda *_: None) for number in STATUS if not _by_nohup(number)}
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
        """Ignore signals from now on: launchers signal all ranks as soon as one exits, which would change the
        status."""
        self._ignored = True
        ignore_all()

    def _listen(self, reader: int) -> None:
        signals = select.poll()
        signals.register(reader, select.POLLIN)
        while True:
            if not signals.poll(CHECK_EVERY * 1000):
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
        if not self.can_save or (self.status and now - self._since > SAME_REQUEST):
            if number != signal.SIGTERM or process.world_size() == 1:
                with suppress(OSError):  # this thread must go on
                    self.last_words()
            leave("interrupted", status, timeout=0.0)
        if not self.status:
            self.status, self._since = status, now


def ignore_all() -> None:
    """Ignore all of these signals, in a worker process that its parent stops: terminals and batch systems also signal
    workers."""
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)


def _by_nohup(number: signal.Signals) -> bool:
    """Whether `nohup` made this process ignore the signal. SIGINT and SIGQUIT are not checked: shells ignore them in
    background jobs of a script, but a signal sent to such a job by its id is a request."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
