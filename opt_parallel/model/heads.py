"""What stands on the decoder: the language model's tied output projection."""

from __future__ import annotations

from torch import Tensor, nn

from opt_parallel.config import ActivationCheckpointing
from opt_parallel.model.opt import Cache, Decoder
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
