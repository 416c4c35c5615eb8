"""A checkpoint of ours or a Hugging Face folder, opened alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from opt_parallel.checkpoint.reshard import MANIFEST, CheckpointWeights, read_manifest
from opt_parallel.errors import UserError
from opt_parallel.model.heads import CausalLM
from opt_parallel.model.hf import CONFIG, HuggingFaceWeights, read_config
from opt_parallel.parallel.shard import Source, fill
from opt_parallel.shapes import ModelConfig
from opt_parallel.topology import Group


@dataclass(frozen=True)
class Opened:
    """The network's shape, a source of its weights, and the folder that holds its tokenizer."""

    config: ModelConfig
    weights: Source
    tokenizer: Path

    def model(self, group: Group, device: torch.device, dtype: torch.dtype = torch.float32) -> CausalLM:
        """The model itself, this rank's part of it."""
        with torch.device("meta"):
            model = CausalLM(self.config, group)
        fill(model, self.weights, device, dtype)
        return model.eval()


def open_checkpoint(folder: Path) -> Opened:
    """Open one of our `checkpoints/step-<N>` or a Hugging Face folder.

    Raises: UserError if `folder` is neither."""
    if (folder / MANIFEST).is_file():
        saved = read_manifest(folder)["config"]["model"]
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), saved))
        assert isinstance(config, ModelConfig)
        return Opened(config, CheckpointWeights(folder), folder / "tokenizer")
    if (folder / CONFIG).is_file():
        return Opened(read_config(folder), HuggingFaceWeights(folder), folder)
    raise UserError(
        f"--checkpoint {folder} is neither a training checkpoint (…/checkpoints/step-<N>, with {MANIFEST}) nor a "
        f"Hugging Face folder (with {CONFIG})"
    )
