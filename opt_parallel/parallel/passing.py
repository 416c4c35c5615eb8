"""A model that holds the parameters of only the module that computes."""

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
    """Within the context, each module of a `model` on the meta device reads this rank's ranges of its own parameters
    from `source` when it is called, and frees them when it returns.

    Needs the memory of one module instead of the model's; every forward reads all parameters. Works without gradients,
    for modules that do not use other modules' parameters."""
    names = {parameter: name for name, parameter, _ in marked(model)}  # a tied parameter under its first name
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
