"""The outputs of a model's forward: Hugging Face's output classes, with the same field names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from opt_parallel.model.cache import Cache


@dataclass(eq=False)
class ModelOutput(dict[str, Any]):
    """Fields are accessible as attributes, by name, and by index or slice of `to_tuple()`. As a dictionary it holds the
    fields that are not None, in order."""

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        first = getattr(self, names[0]) if names else None
        if isinstance(first, Mapping):  # a copy from a dictionary, as accelerate makes it
            for name in names:
                setattr(self, name, first.get(name))

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if value is None:
            self.pop(name, None)
        else:
            dict.__setitem__(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass(eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """`last_hidden_state` (B, S, E); `hidden_states`: layers + 1 tensors (B, S, H), the last is `last_hidden_state`;
    `attentions`: a tensor (B, A, S, K) for each layer, with the heads of all ranks."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """`loss`: 0-d, the mean over the labels that are not −100; `logits` (B, S, V) of the full vocabulary."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """`loss`: 0-d; `logits` (B, number of labels) at each row's last token."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
