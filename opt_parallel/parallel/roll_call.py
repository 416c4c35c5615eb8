"""Which ranks still answer, asked through the ranks' store once a collective has failed, and who says it.

Each rank has a thread that answers, so that one which only waits for others counts as alive. A rank that is stopped or
gone does not answer. One that answers and whose own collective does not fail is busy elsewhere: it tells where.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL = 1.0  # seconds between two looks whether somebody asks
ANSWERED = 5.0  # seconds for an answer
UNREACHABLE = 20.0  # seconds for the store itself
PACKAGE = Path(__file__).parent


class RollCall:
    """`connect` makes a connection to a store of torch's, for this run alone; `hosts`: each rank's host."""

    def __init__(self, connect: Callable[[], Any], rank: int, hosts: tuple[str, ...]) -> None:
        self._store, self._rank, self._hosts = connect(), rank, hosts
        self._over = threading.Event()
        threading.Thread(target=self._answer, args=(connect(),), name="roll call", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._over.set()

    def ask(self) -> tuple[str, bool]:
        """After a failure of this rank's: which ranks are missing, in words, and whether this one shall say so. Of each
        host one does, the lowest that answers if it fails, too."""
        found: list[tuple[str, bool]] = []
        asking = threading.Thread(target=lambda: found.append(self._ask()), daemon=True)
        asking.start()
        asking.join(UNREACHABLE)
        return found[0] if found else self._without_store()

    def _answer(self, store: Any) -> None:
        with suppress(RuntimeError):  # the store is gone
            while not self._over.wait(POLL):
                if store.check(["asked"]):
                    store.set(f"here-{self._rank}", _place_of_main_thread())
                    store.add("here", 1)
                    return

    def _ask(self) -> tuple[str, bool]:
        try:
            missing = self._missing()
            self._store.add("done", 1)
            if self._rank == 0:  # which may be the one that keeps the store
                self._wait(lambda: self._store.add("done", 0) == self._store.add("failed", 0))
            return missing
        except RuntimeError:
            return self._without_store()

    def _missing(self) -> tuple[str, bool]:
        store, ranks = self._store, range(len(self._hosts))
        store.set("asked", "")
        store.set(f"failed-{self._rank}", "")
        store.add("failed", 1)
        self._wait(lambda: store.add("here", 0) == len(ranks))
        below = [rank for rank in self._neighbours() if rank < self._rank and store.check([f"here-{rank}"])]
        another = below and self._wait(lambda: any(store.check([f"failed-{rank}"]) for rank in below))
        if another or store.add(f"said-{self._hosts[self._rank]}", 1) > 1:
            return "", False
        silent = [rank for rank in ranks if not store.check([f"here-{rank}"])]
        if silent:
            return f"no answer from {self._named(silent)}", True
        self._wait(lambda: store.add("failed", 0) == len(ranks))
        busy = [rank for rank in ranks if not store.check([f"failed-{rank}"])]
        if not busy:
            return "all ranks answer", True
        return f"{self._named(busy)} is still at {store.get(f'here-{busy[0]}').decode()}", True

    def _without_store(self) -> tuple[str, bool]:
        """Where no launcher keeps the store, rank 0 does, and is the one that is missing."""
        kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        alive = [rank for rank in self._neighbours() if rank > 0 or kept_by_launcher]
        missing = "the launcher that keeps the ranks' store" if kept_by_launcher else self._named([0])
        return f"no answer from {missing}", self._rank == min(alive, default=self._rank)

    def _neighbours(self) -> list[int]:
        """The ranks of this host."""
        return [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._rank]]

    def _named(self, ranks: list[int]) -> str:
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        return "; ".join(f"{self._hosts[rank]}, rank {rank}" for rank in ranks[:3]) + more

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + ANSWERED
        while not (holds := condition()) and time.monotonic() < end:
            time.sleep(POLL / 10)
        return holds


def _place_of_main_thread() -> str:
    """Where in the package the main thread is: `data/batches.py, line 61`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}, line {frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"
