"""What a user got wrong, said in one line."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user's. The message is one line that names the value and the way out."""


def one_line(error: BaseException) -> str:
    """The first telling lines of a library's message, joined into one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return "; ".join(kept) or type(error).__name__


def leave(line: str, status: int = 2, patience: float = 10.0) -> NoReturn:
    """End this process with `status`; under a launcher rank 0 alone prints `line`.

    A launcher ends every rank as soon as one of them stops. So the others wait to be told, `patience` seconds at most,
    since rank 0 must get to speak first; and rank 0 stays a moment, for those that are still starting.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {line}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(patience / 2)
    elif patience:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        time.sleep(patience)
        print(f"error: {line}", file=sys.stderr)  # nobody ended us: the mistake is this rank's alone
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: a half-open process group would wait for ranks that are gone


@contextmanager
def reporting(
    expected: tuple[type[Exception], ...] = (), explain: Callable[[BaseException], str] = str
) -> Iterator[None]:
    """Turn a user's mistake into one line and status 2.

    `expected` are the types of a library in front of us (Hydra, OmegaConf) whose errors are the user's too; `explain`
    puts them into words. Everything else is our own fault and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        leave(str(error))
    except expected as error:
        leave(explain(error))
    except BrokenPipeError:  # whoever read our output has had enough, as `head` has
        os._exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        leave("interrupted", status=130, patience=0.0)
