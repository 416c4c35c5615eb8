"""TensorFlow's and Flax's own files: our logits are those of the model that saved them.

Runs where requirements.txt of this folder is installed, and is skipped elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"
pytest.importorskip("tensorflow")
pytest.importorskip("flax")

import jax
import tensorflow as tf
import transformers

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.parallel.topology import ALONE

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "init_std": 0.2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "projected": {"word_embed_proj_dim": 24},
    "gelu": {"activation_function": "gelu"},
}
IDS = np.random.default_rng(5).integers(4, SHAPE["vocab_size"], (3, 20))


def flax_model(config: Any, kind: str) -> Any:
    model = getattr(transformers, f"FlaxOPT{kind}")(config, seed=3)
    keys = iter(jax.random.split(jax.random.PRNGKey(3), 1000))
    model.params = jax.tree_util.tree_map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), model.params)
    return model


def tensorflow_model(config: Any, kind: str) -> Any:
    tf.random.set_seed(3)
    model = getattr(transformers, f"TFOPT{kind}")(config)
    model(IDS)
    for variable in model.variables:
        variable.assign_add(0.05 * tf.random.normal(variable.shape))
    return model


@pytest.mark.parametrize("size", ["1GB", "60KB"])
@pytest.mark.parametrize("kind", ["ForCausalLM", "Model"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [tensorflow_model, flax_model])
def test_our_output_is_theirs(tmp_path: Path, make: Any, variant: str, kind: str, size: str) -> None:
    model = make(transformers.OPTConfig(**{**SHAPE, **VARIANTS[variant]}), kind)
    model.save_pretrained(tmp_path, max_shard_size=size)
    files = [path for path in tmp_path.iterdir() if path.suffix in (".h5", ".msgpack")]
    assert (len(files) > 1) == (size == "60KB")
    expected = torch.from_numpy(np.array(model(IDS)[0]))
    with torch.no_grad():
        ours = open_checkpoint(tmp_path).model(ALONE, torch.device("cpu"))
        output = (ours if kind == "ForCausalLM" else ours.decoder)(torch.from_numpy(IDS))
    # fp32 outputs of order 10, from other libraries' products and softmax
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def test_flax_bfloat16_in_chunks(tmp_path: Path, monkeypatch: Any) -> None:
    model = flax_model(transformers.OPTConfig(**SHAPE), "ForCausalLM")
    model.params = model.to_bf16(model.params)
    monkeypatch.setattr("flax.serialization.MAX_CHUNK_SIZE", 1000)  # bytes, instead of 1 GiB
    model.save_pretrained(tmp_path)
    assert b"__msgpack_chunked_array__" in (tmp_path / "flax_model.msgpack").read_bytes()
    model.params = model.to_fp32(model.params)
    with torch.no_grad():
        output = open_checkpoint(tmp_path).model(ALONE, torch.device("cpu"))(torch.from_numpy(IDS))
    torch.testing.assert_close(output, torch.from_numpy(np.array(model(IDS)[0])), rtol=0, atol=1e-4)
