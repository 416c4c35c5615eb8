"""Keys of a state dict: transformers' names, with query, key and value apart; inside, the three are one parameter."""

from __future__ import annotations

from typing import Any

import torch

from opt_parallel.huggingface.names import PARTS, QKV


def split_keys(state: dict[str, Any], prefix: str) -> None:
    """Replace, in place, each parameter of `state` under `prefix` that holds query, key and value by views of the
    three."""
    entries = list(state.items())
    state.clear()
    for name, values in entries:
        if name.startswith(prefix) and f".{QKV}." in name:
            parts = values.unbind(0)
            state.update({name.replace(QKV, part): each for part, each in zip(PARTS, parts, strict=True)})
        else:
            state[name] = values


def join_keys(state: dict[str, Any], prefix: str) -> None:
    """The inverse of `split_keys`. Parts that are incomplete or of different shapes stay, for torch to report."""
    for name in [name for name in state if name.startswith(prefix) and f".{PARTS[0]}." in name]:
        names = [name.replace(PARTS[0], part) for part in PARTS]
        if all(each in state for each in names) and len({state[each].shape for each in names}) == 1:
            state[name.replace(PARTS[0], QKV)] = torch.stack([state.pop(each) for each in names])
