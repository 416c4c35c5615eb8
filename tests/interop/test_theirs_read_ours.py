"""TensorFlow's and Flax's OPT read our export and compute the same.

Runs where requirements.txt of this folder is installed, and is skipped elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"
pytest.importorskip("tensorflow")
pytest.importorskip("flax")

import numpy as np
import transformers
from safetensors.torch import save_file

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.parallel.topology import ALONE
from opt_parallel.tools.export import export

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "init_std": 0.2,
}  # fmt: skip
VARIANTS = {"pre-norm": {}, "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24}}
IDS = torch.randint(4, SHAPE["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, -6:] = 0


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our export of a network whose biases and LayerNorms have left 0 and 1."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**SHAPE, **VARIANTS[request.param]))
    model.config.save_pretrained(folder / "source")
    values = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.named_parameters()}
    save_file({name: tensor.detach() for name, tensor in values.items()}, folder / "source" / "model.safetensors")
    export(folder / "source", folder / "export", 10**9, ExportDtype.float32)
    return folder / "export"


@pytest.mark.parametrize("head", ["ForCausalLM", "Model"])
@pytest.mark.parametrize("framework", ["TF", "Flax"])
def test_their_outputs_are_ours(exported: Path, framework: str, head: str) -> None:
    theirs = getattr(transformers, f"{framework}OPT{head}").from_pretrained(exported)
    expected = torch.from_numpy(np.array(theirs(input_ids=IDS.numpy(), attention_mask=MASK.numpy())[0]))
    ours = open_checkpoint(exported).model(ALONE, torch.device("cpu"))
    with torch.no_grad():
        output = (ours if head == "ForCausalLM" else ours.decoder)(IDS, segments=MASK)
    # fp32 outputs of order 10, other libraries' products and softmax
    torch.testing.assert_close(output[MASK.bool()], expected[MASK.bool()], rtol=0, atol=1e-4)
