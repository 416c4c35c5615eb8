"""Ends this rank soon after another rank has died, even if the main thread hangs in a call to the device.

The ranks form a ring of connections. Each rank sends the next rank a beat every few seconds, and waits for the beats of
the previous rank. Daemon threads do this, so it continues while the main thread computes, compiles, saves or hangs.

* The previous rank's process ended: the system closes the connection, which is noticed at once.
* The previous rank's machine or network is lost, or its process is stopped: no beat arrives for `PATIENCE` seconds.

The rank that notices tells the next rank, which tells its next, so that all ranks know within milliseconds. Then all
ranks find out who does not answer (`roll_call`), one rank of each host prints it, and all end with the status of
`Lost`. The main thread may notice the same loss by a collective that fails: whichever thread starts the roll call first
ends the process.

A rank that leaves the ring on purpose says so to both neighbours. Each neighbour answers, because gloo cannot cancel a
pending receive, and a thread that waits inside gloo while Python ends would abort the process.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Work

from opt_parallel.parallel.roll_call import RollCall
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import OURS

BEAT = 5.0  # Seconds between two beats.
PATIENCE = 30.0  # Seconds without a beat after which the previous rank counts as lost.
ALIVE, LEFT, ENDED, SILENT = range(4)  # Messages. The last two say what happened to a rank.
FORWARD, BACKWARD = range(2)  # Tags of messages from the previous rank and from the next rank.
NEVER = timedelta(days=10_000)
SOON = 5.0  # Seconds in which a neighbour answers, and in which an error is printed.
CONNECT_TIMEOUT = timedelta(minutes=30)


class Ring:
    """This rank's part of the ring. `store` is a torch key-value store that only this ring uses, and
    `hosts` names each rank's host."""

    def __init__(self, store: Any, rank: int, hosts: tuple[str, ...], roll_call: RollCall) -> None:
        # `Any`, because the stubs of torch lack `send` and `recv`.
        self._group: Any = ProcessGroupGloo(store, rank, len(hosts), timeout=CONNECT_TIMEOUT)
        self._previous, self._next = (rank - 1) % len(hosts), (rank + 1) % len(hosts)
        self._rank, self._hosts, self._roll_call = rank, hosts, roll_call
        self._terminal = os.dup(2)  # a run redirects standard error to the rank's log
        self._closed = threading.Event()
        self._silence = 0.0  # seconds since the last beat, counted in beats of our own, which stop if we are stopped
        self._sent: deque[Work] = deque(maxlen=8)  # a message must not be freed before it is sent
        works = (self._listen, self._hear, self._beat)
        self._threads = [threading.Thread(target=work, name="liveness", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Leave the ring. The next rank then no longer waits for this rank's beats."""
        self.close()
        self._leave_to(self._next, FORWARD)
        self._leave_to(self._previous, BACKWARD)
        for thread in self._threads:
            thread.join(SOON)
        os.close(self._terminal)

    def _leave_to(self, neighbour: int, tag: int) -> None:
        with suppress(RuntimeError):  # the neighbour has ended or left
            self._send(LEFT, self._rank, neighbour, tag)

    def close(self) -> None:
        """Stop to watch the previous rank. The next rank notices the end of this process."""
        self._closed.set()

    def _send(self, message: int, rank: int, to: int | None = None, tag: int = FORWARD) -> None:
        work = self._group.send([torch.tensor([message, rank])], self._next if to is None else to, tag)
        self._sent.append(work)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the next rank has ended, which its own next rank notices
            self._send(ALIVE, self._rank)
            while not self._closed.wait(BEAT):
                self._send(ALIVE, self._rank)
                self._silence += BEAT
                if self._silence > PATIENCE:
                    self._lose(SILENT, self._previous)

    def _listen(self) -> None:
        message, rank = ALIVE, self._previous
        while message == ALIVE:
            self._silence = 0.0
            try:
                received = torch.empty(2, dtype=torch.int64)
                self._group.recv([received], self._previous, FORWARD).wait(NEVER)
                message, rank = received.tolist()
            except RuntimeError:  # the connection was closed
                message = ENDED
        self._silence = float("-inf")
        if message == LEFT:
            self._leave_to(self._previous, BACKWARD)
        else:
            self._lose(message, rank)

    def _hear(self) -> None:
        """Wait until the next rank leaves or answers that this rank leaves."""
        with suppress(RuntimeError):  # the next rank has ended, which its own next rank notices
            self._group.recv([torch.empty(2, dtype=torch.int64)], self._next, BACKWARD).wait(NEVER)
            self._leave_to(self._next, FORWARD)

    def _lose(self, message: int, rank: int) -> None:
        """Tell the next rank what happened to `rank`, find out who does not answer, and end this process."""
        if self._closed.is_set():
            return
        with suppress(RuntimeError):  # the next rank has ended
            self._send(message, rank)
        missing, speaks = self._roll_call.ask(ended=rank if message == ENDED else None)
        if self._closed.is_set():  # this rank ended the run in the meantime
            return
        what = "closed its connection" if message == ENDED else f"sent no beat for {PATIENCE:g} s"
        hangs = threading.Timer(SOON, os._exit, [1])  # the terminal or the disk of the log may hang too
        hangs.daemon = True
        hangs.start()
        line = (
            f"error: {self._where(self._rank)}: another rank is gone or cannot be reached "
            f"({self._where(rank)} {what}): {missing}; the same command resumes from the newest checkpoint"
        )
        OURS.info(line)
        if speaks:
            with suppress(OSError):  # the terminal may have been closed
                os.write(self._terminal, f"{line}\n".encode())
        os._exit(1)

    def _where(self, rank: int) -> str:
        return f"{self._hosts[rank]}, rank {rank}"


@contextmanager
def watched(store: Any, rank: int, hosts: tuple[str, ...], roll_call: RollCall) -> Iterator[None]:
    """A context in which this rank is in the ring.

    After a user's mistake or without an error, this rank leaves the ring. After another error its process ends, which
    the other ranks must notice."""
    ring = Ring(store, rank, hosts, roll_call)
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            ring.close()
            raise
        ring.leave()
        raise
    ring.leave()
