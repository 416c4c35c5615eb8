"""Token embeddings with more or fewer rows, at any tensor degree."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from opt_parallel.checkpoint.grown import Grown
from opt_parallel.model.opt import Decoder
from opt_parallel.parallel.shard import Normal, Shard, filled, gather_parameter, mark, shard_of
from opt_parallel.parallel.topology import Group
from opt_parallel.parallel.vocab import VocabParallelEmbedding
from opt_parallel.runtime.errors import UserError, WrongArgument

NAME = "decoder.embed_tokens.weight"


class _Held:
    """All rows of an embedding in memory, as a source for `fill`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.dtype = rows, rows.dtype

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        pass

    def holds(self, name: str) -> bool:
        return name == NAME

    def __call__(self, name: str, shard: Shard) -> Tensor:
        return self.rows[shard.range]


def resized(
    decoder: Decoder, rows: int | None, multiple: int | None, mean_resizing: bool, group: Group
) -> VocabParallelEmbedding:
    """The decoder's embedding with `rows` rows, rounded up to a multiple; itself if it has as many. Each added row is
    the mean of the old ones, as `init_from` adds them. All rows are gathered on every rank for a moment.

    Raises: UserError."""
    old = decoder.embed_tokens
    for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", multiple)):
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{name}={value!r:.80} must be a whole number, at least 1")
    if not mean_resizing:
        raise UserError("mean_resizing=False is not supported: each new row is the mean of the old ones")
    wanted = old.vocab_size if rows is None else rows
    if multiple is not None:
        wanted = -(-wanted // multiple) * multiple
    if wanted == old.vocab_size:
        return old
    full = gather_parameter(old.weight, shard_of(old.weight), group)
    return _embedding(decoder, full, wanted, old.weight.requires_grad, group)


def embedding_of(value: nn.Module, decoder: Decoder, group: Group) -> VocabParallelEmbedding:
    """`value`, an embedding of this class or of torch's, as this rank's part of it. Raises: WrongArgument."""
    if isinstance(value, VocabParallelEmbedding):
        return value
    old, weight = decoder.embed_tokens, getattr(value, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.size(1) != old.weight.size(1):
        raise WrongArgument(
            f"set_input_embeddings: {type(value).__name__} is not an embedding of width {old.weight.size(1)}: give an "
            "nn.Embedding"
        )
    return _embedding(decoder, weight.detach(), weight.size(0), weight.requires_grad, group)


def _embedding(decoder: Decoder, full: Tensor, rows: int, trained: bool, group: Group) -> VocabParallelEmbedding:
    """This rank's part of an embedding of `rows` rows, of which `full` has the first ones."""
    # checks the rows against the ids of special tokens and the tensor degree
    config = replace(decoder.config, vocab_size=rows)
    config.check_splits(group.size, "the tensor degree ")
    old = decoder.embed_tokens
    with torch.device("meta"):
        new = VocabParallelEmbedding(rows, full.size(1), config.pad_token_id, group, config.std)
    source = Grown(_Held(full.cpu()), full.size(0))
    new.weight = filled(new.weight, NAME, source, old.weight.device, old.weight.dtype)
    new.weight.requires_grad_(trained)
    new.pad_token_id = old.pad_token_id
    return new.train(old.training)


def without_padding(embedding: VocabParallelEmbedding) -> None:
    """Make every row of an embedding that is not filled yet an ordinary one: random, with a gradient."""
    shard = shard_of(embedding.weight)
    assert isinstance(shard.initial, Normal)
    mark(embedding.weight, replace(shard, initial=replace(shard.initial, zero_row=None)))
    embedding.pad_token_id = -1  # the id of no token
