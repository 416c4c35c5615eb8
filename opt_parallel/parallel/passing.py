"""A model that holds the parameters of one module at a time, those of the module that computes."""

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
    """While the context lasts, each module of a model made on the meta device asks `source` for this rank's ranges of
    its own parameters when it is called, and lets them go when it returns: the memory of `fill` is never needed, and
    every forward reads everything. For modules that use no other's parameters, and without gradients."""
    names = {parameter: name for name, parameter, _ in marked(model)}  # a tied one under its first name
    handles = []

    def take(own: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
        for name, empty in own.items():
            setattr(module, name, filled(empty, names[empty], source, device, dtype))

    def let_go(own: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
        for name, empty in own.items():
            setattr(module, name, empty)

    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            handles.append(module.register_forward_pre_hook(partial(take, own)))
            handles.append(module.register_forward_hook(partial(let_go, own), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
