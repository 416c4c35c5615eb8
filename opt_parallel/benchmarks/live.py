"""Count the bytes of live tensors through a real optimizer step on a CPU, to hold a plan against."""

from __future__ import annotations

import gc
from collections.abc import Iterator

from torch import Tensor
from torch.nn import Parameter

from opt_parallel.rehearsal.ledger import Ledger, Trace


class Live(Ledger):
    """Counts the bytes of live tensors on the CPU, beginning with those that exist."""

    device, aligned = "cpu", 1

    def __init__(self) -> None:
        super().__init__(Trace(0), [], {})
        for tensor in existing():
            self._count("", tensor)


def existing() -> Iterator[Tensor]:
    """All tensors of this process that Python knows, and their gradients. A compiler's fake tensors are left out."""
    gc.collect()
    for each in gc.get_objects():
        if type(each) in (Tensor, Parameter) and not each.is_meta:
            yield each
            if each.is_leaf and each.grad is not None:
                yield each.grad
