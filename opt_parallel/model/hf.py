"""Hugging Face's names and files for OPT: our parameters ↔ theirs, one tensor or slice at a time.

They keep query, key and value apart; ours are the three blocks of one parameter. Everything else is one to one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opt_parallel.errors import UserError
from opt_parallel.parallel.shard import Shard
from opt_parallel.shapes import Activation, Labels, ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# OPTConfig's fields that shape the network and that ours shares by name
SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings",
    "do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "dropout", "attention_dropout",
    "layerdrop", "bos_token_id", "pad_token_id", "eos_token_id",
)  # fmt: skip
# those that we do not implement, with the one value that means "as published"
FIXED = {"tie_word_embeddings": True}


def hf_names(name: str) -> list[str]:
    """Their names of our parameter `name`: one, or three that ours stacks along its dim 0."""
    theirs = f"model.{name}" if name.startswith("decoder.") else name
    if ".qkv_proj." not in name:
        return [theirs]
    return [theirs.replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj")]


def to_hf(name: str, values: Tensor) -> dict[str, Tensor]:
    """Our logical tensor under their names."""
    names = hf_names(name)
    parts = [values] if len(names) == 1 else list(values.unbind(0))
    return dict(zip(names, parts, strict=True))


def config_for_hf(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **{name: getattr(model, name) for name in SHARED},
        "_remove_final_layer_norm": model.remove_final_layer_norm,
        "activation_function": model.activation_function.value,
        "word_embed_proj_dim": model.embedding_size,
        "init_std": model.std,
        **FIXED,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def labels_for_hf(labels: Labels) -> dict[str, Any]:
    """A classifier's part of config.json."""
    return {
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
        "problem_type": None if labels.problem_type is None else labels.problem_type.value,
    }


def read_config(folder: Path) -> ModelConfig:
    """The network that a Hugging Face folder describes.

    Raises: UserError if it is no OPT, or has a trait that we do not implement."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint: {CONFIG} cannot be read ({error})") from error
    if values.get("model_type") != "opt":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}, not 'opt'")
    for name, published in FIXED.items():
        if values.get(name, published) != published:
            raise UserError(f"{path}: {name}={values[name]} is not supported, only {published}")
    activation = values.get("activation_function", "relu")
    if activation not in Activation.__members__:
        raise UserError(f"{path}: activation_function={activation!r} is not one of {', '.join(Activation.__members__)}")
    shared: dict[str, Any] = {"attention_dropout": 0.0}  # OPTConfig's default, not ours
    shared.update({name: values[name] for name in SHARED if name in values})
    return ModelConfig(
        **shared,
        remove_final_layer_norm=values.get("_remove_final_layer_norm", False),
        word_embed_proj_dim=values.get("word_embed_proj_dim"),
        activation_function=Activation[activation],
        init_std=values.get("init_std"),
    )


class HuggingFaceWeights:
    """A source for `fill`: reads just the slices that a shard needs from one or many safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] | None = None  # their name → file; None: all in one
        if not (folder / WEIGHTS).is_file():
            try:
                self.files = json.loads((folder / INDEX).read_text())["weight_map"]
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{folder} has neither {WEIGHTS} nor a readable {INDEX}") from error

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The values of `shard.range` of our logical tensor `name`.

        Raises: UserError if a file or tensor is missing or has another shape."""
        names = hf_names(name)
        if len(names) == 1:
            return self._slice(names[0], shard.shape, shard.range)
        return torch.stack([self._slice(part, shard.shape[1:], shard.range[1:]) for part in names])

    def _slice(self, name: str, shape: tuple[int, ...], ranges: tuple[slice, ...]) -> Tensor:
        path = self.folder / (WEIGHTS if self.files is None else self.files.get(name, WEIGHTS))
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != shape:
                    raise UserError(f"{path}: {name} has shape {tuple(stored.get_shape())}, the model wants {shape}")
                values = stored[ranges]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from error
        assert isinstance(values, Tensor)
        return values
