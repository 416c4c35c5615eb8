"""The outputs of a model's forward: Hugging Face's output classes, with the same field names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from opt_parallel.model.cache import Cache


@dataclass
class ModelOutput:
    """Fields are accessible as attributes, by name, and by index or slice of `to_tuple()`."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        """Names of the fields that are not None, in order."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """`last_hidden_state` (B, S, E); `hidden_states`: layers + 1 tensors (B, S, H), the last is `last_hidden_state`;
    `attentions`: a tensor (B, A, S, K) for each layer, with the heads of all ranks."""

    last_hidden_state: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """`loss`: 0-d, the mean over the labels that are not −100; `logits` (B, S, V) of the full vocabulary."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """`loss`: 0-d; `logits` (B, number of labels) at each row's last token."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
