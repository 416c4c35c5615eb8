"""Finds the ranks that no longer answer after a collective has failed, and the rank that prints the error.

Ranks ask and answer each other through torch's key-value store. A thread of each rank answers, so that a rank which
waits in a collective still answers. A stopped or dead rank does not answer. A rank that executes other code instead of
the collective answers with the line of code that it executes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL = 1.0  # Seconds between checks for a question.
ANSWER_TIMEOUT = 5.0  # Seconds in which a rank must answer.
STORE_TIMEOUT = 20.0  # Seconds for a complete roll call, after which the key-value store counts as unreachable.
PACKAGE = Path(__file__).parents[1]


class RollCall:
    """Asks all ranks whether they are alive, and answers the questions of other ranks in a thread.

    `store` is a torch key-value store that only this roll call uses. `hosts` names each rank's host."""

    def __init__(self, store: Any, rank: int, hosts: tuple[str, ...]) -> None:
        self._store, self._rank, self._hosts = store, rank, hosts
        self._closed, self._asking = threading.Event(), threading.Lock()
        self._answering = threading.Thread(target=self._answer, name="roll call", daemon=True)
        self._answering.start()

    def close(self) -> None:
        """Stop the thread that answers other ranks. A thread that is inside torch when Python ends aborts the
        process."""
        self._closed.set()
        self._answering.join(ANSWER_TIMEOUT)

    def ask(self, ended: int | None = None) -> tuple[str, bool]:
        """A description of the missing ranks, and whether this rank prints the description.

        Call this method after a collective of this rank has failed, or after the connection to the rank `ended` was
        closed. On each host only one rank prints the description: the lowest rank that has called this method. The
        caller ends the process. A second call, by another thread, never returns."""
        self._asking.acquire()
        found: list[tuple[str, bool]] = []
        asking = threading.Thread(target=lambda: found.append(self._ask(ended)), daemon=True)
        asking.start()
        asking.join(STORE_TIMEOUT)
        return found[0] if found else self._without_store()

    def _answer(self) -> None:
        store = self._store
        with suppress(RuntimeError):  # the process that hosts the key-value store has ended
            while not self._closed.wait(POLL):
                if store.check(["asked"]):
                    store.set(f"here-{self._rank}", _line_of_main_thread())
                    store.add("here", 1)
                    return

    def _ask(self, ended: int | None) -> tuple[str, bool]:
        try:
            missing = self._missing(ended)
            self._store.add("done", 1)
            if self._rank == 0:  # its process may host the key-value store, which other ranks still need
                self._wait(lambda: self._store.add("done", 0) == self._store.add("failed", 0))
            return missing
        except RuntimeError:
            return self._without_store()

    def _missing(self, ended: int | None) -> tuple[str, bool]:
        store, ranks = self._store, range(len(self._hosts))
        store.set("asked", "")
        store.set(f"failed-{self._rank}", "")
        store.add("failed", 1)
        cannot_answer = ended is not None and not store.check([f"here-{ended}"])
        self._wait(lambda: store.add("here", 0) >= len(ranks) - cannot_answer)
        below = [rank for rank in self._neighbours() if rank < self._rank and store.check([f"here-{rank}"])]
        another = below and self._wait(lambda: any(store.check([f"failed-{rank}"]) for rank in below))
        if another or store.add(f"said-{self._hosts[self._rank]}", 1) > 1:
            return "", False
        silent = _absent(store, "here", ranks)
        if silent:
            return f"no answer from {self._named(silent)}", True
        self._wait(lambda: store.add("failed", 0) == len(ranks))
        busy = _absent(store, "failed", ranks)
        if not busy:
            return "all ranks answer", True
        return f"{self._named(busy)} is still at {store.get(f'here-{busy[0]}').decode()}", True

    def _without_store(self) -> tuple[str, bool]:
        """The result of `ask` if the key-value store is unreachable, so the process that hosts it must be missing.

        The store is hosted by the launcher or by rank 0."""
        hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        alive = [rank for rank in self._neighbours() if rank > 0 or hosted_by_launcher]
        missing = "the launcher that hosts the ranks' store" if hosted_by_launcher else self._named([0])
        return f"no answer from {missing}", self._rank == min(alive, default=self._rank)

    def _neighbours(self) -> list[int]:
        """The ranks on this rank's host."""
        return [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._rank]]

    def _named(self, ranks: list[int]) -> str:
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        return "; ".join(f"{self._hosts[rank]}, rank {rank}" for rank in ranks[:3]) + more

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + ANSWER_TIMEOUT
        while not (holds := condition()) and time.monotonic() < end:
            time.sleep(POLL / 10)
        return holds


def _absent(store: Any, name: str, ranks: Sequence[int]) -> list[int]:
    """The `ranks` without a key `name`-<rank>. Halving takes few requests, even for thousands of ranks."""
    if store.check([f"{name}-{rank}" for rank in ranks]):
        return []
    half = len(ranks) // 2
    return _absent(store, name, ranks[:half]) + _absent(store, name, ranks[half:]) if half else list(ranks)


def _line_of_main_thread() -> str:
    """The line of this package that the main thread executes, such as `data/samples/batches.py, line 61`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}, line {frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"
