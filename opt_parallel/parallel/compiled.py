"""Applies torch.compile to short functions of large tensors, if the device has a working compiler.

An eager function reads and writes its tensors once for each operation. The compiled function does so only once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from opt_parallel.runtime.log import say

COMPILED_FROM = 2**19  # elements. For smaller tensors, compilation takes longer than the time it saves.


def compiled(function: Callable[..., Any], dynamic: bool | None = True) -> Callable[..., Any]:
    """`function`, compiled for calls whose first argument is a tensor of COMPILED_FROM elements or more.

    `function` may contain only tensor operations, no collectives. On a host without a working compiler, `function`
    runs eagerly, and a message is printed.

    Args:
        dynamic: True compiles once for all shapes. None compiles for the first shape, whose calls start in a third of
            the time, and once more for all shapes when another shape comes."""

    @wraps(function)
    def call(large: Tensor, *rest: Any) -> Any:
        if large.numel() < COMPILED_FROM or not _works(large.device.type):
            return function(large, *rest)
        return _fast(function, dynamic)(large, *rest)

    return call


@cache
def _fast(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    return torch.compile(function, dynamic=dynamic)


@cache
def _works(device: str) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # importing torch._dynamo takes seconds

    try:
        torch.compile(torch.exp)(torch.ones(8, device=device))
    except TorchDynamoException as error:
        say(f"torch.compile does not work here, so training is slower: {str(error).strip().splitlines()[0]}")
        return False
    return True
