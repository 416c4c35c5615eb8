"""Do transformers and we compute the same from the same files?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from opt_parallel.checkpoint.reading import open_checkpoint
from opt_parallel.errors import UserError
from opt_parallel.hf_config import CONFIG
from opt_parallel.topology import ALONE

TOLERANCE = 1e-4  # fp32 logits of order 10, sums in another order
LENGTH, PADDING = 32, 5


def logit_differences(folder: Path) -> dict[str, float]:
    """The largest difference between our fp32 logits and transformers' for random ids: plain, left- and right-padded.

    Padded positions do not count. Raises: UserError if `folder` is no Hugging Face folder, or transformers is missing.
    """
    try:
        from transformers import OPTForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("verification needs transformers: pip install 'opt-parallel[dev]'") from error
    logging.disable_progress_bar()
    opened = open_checkpoint(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"--checkpoint {folder} is not what transformers reads: export it first (scripts/export.py)")
    ours = opened.model(ALONE, torch.device("cpu"))
    theirs = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    length = min(LENGTH, opened.config.max_position_embeddings)
    ids = torch.randint(opened.config.vocab_size, (2, length), generator=generator)
    return {name: _difference(ours, theirs, ids, mask) for name, mask in _masks(ids).items()}


def _masks(ids: Tensor) -> dict[str, Tensor | None]:
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :PADDING] = 0
    right[0, -PADDING:] = 0
    return {"unpadded": None, "left-padded": left, "right-padded": right}


@torch.no_grad()
def _difference(ours: torch.nn.Module, theirs: torch.nn.Module, ids: Tensor, mask: Tensor | None) -> float:
    difference = (ours(ids, segments=mask) - theirs(input_ids=ids, attention_mask=mask).logits).abs()
    return float((difference if mask is None else difference[mask.bool()]).max())
