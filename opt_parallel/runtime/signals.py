"""Turn signals (SIGINT, SIGTERM, SIGUSR1, SIGHUP, SIGQUIT) and the launcher's exit into a status that the training loop
reads after each step.

A thread reads the signals through Python's wake-up descriptor. Thanks to this thread, a second signal ends the process
even if the main thread hangs in a collective.
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
CHECK_EVERY = 1.0  # Seconds between two checks that the launcher is alive.
SAME_REQUEST = 5.0  # Seconds; a second signal within this time is the launcher's copy of the first.


class Interrupt:
    """Whether this process was asked to stop. `status` is the exit status for that request, or 0 if there was none.

    The process calls `last_words` and exits at once if `can_save` is not set yet, or on a second request more than
    `SAME_REQUEST` seconds after the first. On SIGTERM with several ranks the process exits without calling
    `last_words`, because launchers also send SIGTERM after another rank crashed."""

    def __init__(self) -> None:
        self.status = 0
        self.can_save = False
        self.last_words: Callable[[], None] = lambda: None
        self._since = 0.0
        self._ignored = False

    @classmethod
    @contextmanager
    def watch(cls) -> Iterator[Interrupt]:
        """Handle the signals while the context lasts."""
        interrupt = cls()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # The descriptor is set before the handlers, so that no signal is lost.
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
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
        """Ignore signals from now on. Launchers signal all ranks as soon as one rank exits, and this would change the
        exit status."""
        self._ignored = True
        ignore_all()

    def _listen(self, reader: int) -> None:
        signals = select.poll()
        signals.register(reader, select.POLLIN)
        while True:
            if not signals.poll(CHECK_EVERY * 1000):
                if not self.status and process.launcher_is_gone():
                    say(f"warning: the launcher, process {process.PARENT}, has ended: this run stops as on SIGTERM")
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
                with suppress(OSError):  # an error must not end this thread
                    self.last_words()
            leave("interrupted", status, timeout=0.0)
        if not self.status:
            self.status, self._since = status, now


def ignore_all() -> None:
    """Ignore all of these signals in a worker process. Terminals and batch systems signal workers too, but only the
    parent process stops its workers."""
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)


def _by_nohup(number: signal.Signals) -> bool:
    """Whether `nohup` made this process ignore the signal. SIGINT and SIGQUIT are not checked, because a shell script
    also ignores them in its background jobs, where a user may still send them with `kill` to stop the run."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
