"""Checks of a forward's arguments, and its attention mask. A wrong argument is a ValueError of one line."""

from __future__ import annotations

import torch
from torch import Tensor

from opt_parallel.config.model import IGNORED, ModelConfig, ProblemType


def check_inputs(model: ModelConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
    """The ids as (B, S), or None if there are embeddings (B, S, E). Raises: ValueError."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"give exactly one of input_ids and inputs_embeds: {given} was given")
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3 or inputs_embeds.size(2) != model.embedding_size:
            raise ValueError(
                f"inputs_embeds is {tuple(inputs_embeds.shape)}, not (batch, positions, {model.embedding_size})"
            )
        return None
    assert input_ids is not None
    check_ids("input_ids", input_ids, model.vocab_size)
    if input_ids.dim() == 0 or input_ids.size(-1) == 0:
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}, not (batch, positions) with at least one position")
    return input_ids.view(-1, input_ids.size(-1))


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `ids` are integers of the vocabulary."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}: give a tensor of token ids, as a tokenizer's "
                         "return_tensors='pt' does")  # fmt: skip
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {_name(ids.dtype)}: token ids are int64 (torch.long)")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"{name} holds ids from {int(ids.min())} to {int(ids.max())}, outside 0 to vocab_size − 1 = "
            f"{vocab_size - 1}"
        )


def check_mask(attention_mask: Tensor, batch: int, keys: int) -> None:
    """Raise ValueError unless the mask is (B, K) of zeros and ones."""
    if attention_mask.shape != (batch, keys):
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not (batch, keys) = {(batch, keys)}")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask holds values other than 1 (a token) and 0 (padding)")


def check_head_mask(head_mask: Tensor, model: ModelConfig) -> Tensor:
    """The head mask as (L, A). Raises: ValueError."""
    shape = (model.num_hidden_layers, model.num_attention_heads)
    if head_mask.shape not in (shape, shape[1:]):
        raise ValueError(f"head_mask is {tuple(head_mask.shape)}, not (layers, heads) = {shape}, nor {shape[1:]}")
    return head_mask.expand(shape)


def check_positions(position_ids: Tensor, model: ModelConfig, batch: int, length: int) -> Tensor:
    """The positions as (B, S). Raises: ValueError."""
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(f"position_ids is {tuple(position_ids.shape)}, not {(batch, length)}")
    if not -2 <= int(position_ids.min()) <= int(position_ids.max()) < model.max_position_embeddings:
        raise ValueError(
            f"position_ids holds positions outside 0 to max_position_embeddings − 1 = "
            f"{model.max_position_embeddings - 1} (and −1 for padding)"
        )
    return position_ids.expand(batch, length)


def check_token_labels(labels: Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Raise ValueError unless `labels` are token ids or −100, in the shape (B, S) of the input."""
    if labels.shape != shape:
        raise ValueError(f"labels is {tuple(labels.shape)}, and the input {tuple(shape)}: one label for each token")
    check_ids("labels (besides −100)", labels.masked_fill(labels == IGNORED, 0), vocab_size)


def check_labels(labels: Tensor, batch: int, num_labels: int, problem_type: ProblemType) -> None:
    """Raise ValueError unless `labels` are those of `batch` sequences."""
    if problem_type is ProblemType.single_label_classification:
        if labels.is_floating_point() or labels.numel() != batch:
            raise ValueError(
                f"labels is {tuple(labels.shape)} of {_name(labels.dtype)}: a single label is one integer for each of "
                f"{batch} sequences"
            )
        outside = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_labels))]
        if outside.numel():
            raise ValueError(f"labels holds {int(outside[0])}, outside 0 to num_labels − 1 = {num_labels - 1}")
    elif labels.shape != (batch, num_labels) and not (num_labels == 1 and labels.numel() == batch):
        raise ValueError(f"labels is {tuple(labels.shape)}, not (batch, num_labels) = {(batch, num_labels)}")


def mask_of(attention_mask: Tensor, length: int) -> Tensor | None:
    """True where a query may attend to a key, (B, 1, S, K), as transformers has it: to earlier tokens that are not
    padding, also if the query itself is padding. None if nothing is padding."""
    if bool(attention_mask.all()):
        return None
    keys = attention_mask.size(1)
    causal = torch.ones(length, keys, dtype=torch.bool, device=attention_mask.device).tril(diagonal=keys - length)
    return causal & attention_mask.bool()[:, None, None, :]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
