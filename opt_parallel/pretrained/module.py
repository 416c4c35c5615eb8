"""What a torch module promises, for the three classes: keys of the state dict, copies, counts, recomputation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.model.opt import Decoder
from opt_parallel.parallel.shard import Shard, mark, marked
from opt_parallel.pretrained.keys import join_keys, split_keys
from opt_parallel.runtime.errors import WrongArgument


class OPTModule(nn.Module):
    """A module with a decoder, which `base_model` holds, whose parameters carry marks."""

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    @property
    def base_model(self) -> Any:
        """The OPTModel: `model` of a model with a head, else the model itself."""
        return self.model if hasattr(self, "model") else self

    def get_decoder(self) -> Decoder:
        """The decoder."""
        decoder = self.base_model.decoder
        assert isinstance(decoder, Decoder)
        return decoder

    def tie_weights(self) -> None:
        """Give the output projection the embedding's parameter."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.get_decoder().embed_positions.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.get_decoder().embed_positions.weight.device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of the unsplit model, a tied head counted once."""
        left_out = ("embed_tokens.weight", "embed_positions.weight") if exclude_embeddings else ()
        return sum(
            shard.numel
            for name, parameter, shard in marked(self)
            if not name.endswith(left_out) and (parameter.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The bytes of this process's parameters and, unless `return_buffers=False`, of its buffers."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in held)

    def can_generate(self) -> bool:
        """Whether the model has `generate`."""
        return hasattr(self, "generate")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Recompute every layer in the backward. Only `use_reentrant=False` exists. Raises: WrongArgument."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its newer name. Raises: WrongArgument."""
        others = dict(activation_checkpointing_kwargs or {})
        if others not in ({}, {"use_reentrant": False}) or every_n_layers != 1 or offload:
            raise WrongArgument(
                f"checkpointing with {others!s:.200}, every_n_layers={every_n_layers}, offload={offload} is not "
                "supported: every layer is recomputed, with use_reentrant=False; leave these out"
            )
        self.get_decoder().recompute = ActivationCheckpointing.full

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of all layers for the backward."""
        self.get_decoder().recompute = ActivationCheckpointing.none

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward."""
        return self.get_decoder().recompute is ActivationCheckpointing.full

    def state_dict(self, *args: Any, **arguments: Any) -> Any:
        """torch's `state_dict` with transformers' keys. Query, key and value are views of one parameter."""
        state = super().state_dict(*args, **arguments)
        split_keys(state, arguments.get("prefix", ""))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        join_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's `load_state_dict` with the keys of `state_dict`. The head stays tied."""
        marks = _marks(self)
        loaded = super().load_state_dict(state_dict, strict, assign)
        _restore_marks(self, marks)  # `assign` replaces parameters
        self.tie_weights()
        return loaded

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        _restore_marks(copied, _marks(self))
        return copied


def _marks(model: nn.Module) -> dict[str, Shard]:
    return {name: shard for name, _, shard in marked(model)}


def _restore_marks(model: nn.Module, marks: dict[str, Shard]) -> None:
    """Mark parameters that were replaced by copies: torch does not copy a parameter's attributes."""
    for name, shard in marks.items():
        mark(model.get_parameter(name), shard)
