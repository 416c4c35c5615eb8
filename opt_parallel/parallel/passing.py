"""Runs a model with the parameters of only one module in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from opt_parallel.parallel.shard import Source, filled, marked


@contextmanager
def filled_in_turn(model: nn.Module, source: Source, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A context in which each module of a `model` on the meta device loads its parameters only while it is called.

    A module reads this rank's parts of its own parameters from `source` when it is called, and frees them when it
    returns. So a forward pass needs the memory of one module, and reads all parameters again. No gradients can be
    computed. A module must not use the parameters of other modules."""
    names = {parameter: name for name, parameter, _ in marked(model)}  # tied parameters have two names
    handles = []

    def take(own: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
        for name, empty in own.items():
            setattr(module, name, filled(empty, names[empty], source, device, dtype))

    def free(own: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
        for name, empty in own.items():
            setattr(module, name, empty)

    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            handles.append(module.register_forward_pre_hook(partial(take, own)))
            handles.append(module.register_forward_hook(partial(free, own), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
