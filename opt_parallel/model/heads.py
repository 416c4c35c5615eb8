"""What stands on the decoder: the language model's tied output projection, or a classifier's score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opt_parallel.config import ActivationCheckpointing
from opt_parallel.model.cache import Cache
from opt_parallel.model.opt import Decoder
from opt_parallel.parallel.linear import Linear
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.vocab import VocabParallelHead
from opt_parallel.shapes import ModelConfig
from opt_parallel.topology import Group


class CausalLM(nn.Module):
    """OPT as a language model. Built on the meta device and given memory and values by `fill`."""

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        recompute: ActivationCheckpointing = ActivationCheckpointing.none,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(config, group, recompute)
        self.lm_head = VocabParallelHead(self.decoder.embed_tokens)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        draw: Draw | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """With `labels` (B, S), each the token to come or −100: the sum of their losses. Without: logits (B, S, V).

        The other arguments are the decoder's.
        """
        hidden = self.decoder(ids, positions, segments, draw, cache)
        return self.lm_head(hidden, labels)


class SequenceClassifier(nn.Module):
    """OPT with `num_labels` scores read at the last token of a sequence. Made and filled like `CausalLM`."""

    def __init__(
        self,
        config: ModelConfig,
        num_labels: int,
        group: Group,
        recompute: ActivationCheckpointing = ActivationCheckpointing.none,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(config, group, recompute)
        self.score = Linear(config.embedding_size, num_labels, config.std)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Scores (B, num_labels) of the sequences `ids` (B, S). The arguments are the decoder's."""
        hidden = self.decoder(ids, positions, segments, draw)
        return self.score(last_tokens(hidden, ids, self.decoder.config.pad_token_id))


def last_tokens(hidden: Tensor, ids: Tensor | None, pad_token_id: int) -> Tensor:
    """Of `hidden` (B, S, E) each row's right-most token that is not padding (B, E), wherever the padding stands.

    As in Hugging Face's OPT, ids alone decide; without them it is the last position.
    """
    if ids is None:
        return hidden[:, -1]
    places = torch.arange(ids.size(1), device=ids.device) * (ids != pad_token_id)
    return hidden[torch.arange(ids.size(0), device=ids.device), places.argmax(dim=1)]
