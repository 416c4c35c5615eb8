"""Writes small OPT checkpoints in the formats of transformers, and of its former TensorFlow and Flax classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "init_std": 0.2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "post-norm": {"do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 24},
    "gelu": {"activation_function": "gelu"},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}


def random_model(variant: dict[str, Any] | None = None, kind: str = "OPTForCausalLM") -> Any:
    """A transformers model with random weights from a fixed seed, whose biases are not 0 and whose LayerNorms not 1."""
    import transformers

    torch.manual_seed(3)
    model = getattr(transformers, kind)(transformers.OPTConfig(**{**SHAPE, **(variant or {})})).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def some_ids() -> Tensor:
    return torch.randint(4, SHAPE["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=some_ids()).logits


def write_h5(model: Any, folder: Path, layout: str) -> None:
    """Write `model` in the layout of TFOPTForCausalLM.save_pretrained of transformers 4.53, in NumPy's dtypes.

    In the layout `single`, names are in Keras's groups of layers and classes. In the layout `split`, there are several
    files with plain names, and an index."""
    import h5py

    _write_config(model, folder)
    arrays = {
        _other_name(name, {"weight": "kernel"}, {"weight": "gamma", "bias": "beta"}) + ":0": values
        for name, values in _transposed(model).items()
    }
    arrays = {name.replace("embed_positions/weight", "embed_positions/embeddings"): a for name, a in arrays.items()}
    if layout == "single":
        with h5py.File(folder / "tf_model.h5", "w") as file:
            file.attrs["layer_names"] = [b"model"]
            file.create_group("top_level_model_weights")
            for name, values in arrays.items():
                file.create_dataset(f"model/tfopt_for_causal_lm/{name}", data=values)
        return
    files = {name: f"tf_model-0000{1 + number % 2}-of-00002.h5" for number, name in enumerate(arrays)}
    for name, values in arrays.items():
        with h5py.File(folder / files[name], "a") as file:
            file.create_dataset(name, data=values)
    _write_index(folder / "tf_model.h5.index.json", {f"tfopt_for_causal_lm/{name}": f for name, f in files.items()})


def write_msgpack(model: Any, folder: Path, layout: str, chunk: int | None = None) -> None:
    """Write `model` in the layout of FlaxOPTForCausalLM.save_pretrained of transformers 4.53, in the model's dtype.

    An array with more than `chunk` elements is written in chunks."""
    import msgpack

    _write_config(model, folder)
    bfloat16 = model.dtype is torch.bfloat16

    def packed(values: Any) -> msgpack.ExtType:
        triple = (values.shape, "bfloat16" if bfloat16 else values.dtype.name, values.tobytes())
        return msgpack.ExtType(1, msgpack.packb(triple, use_bin_type=True))

    def leaf(values: Any) -> Any:
        if chunk is None or values.size <= chunk:
            return packed(values)
        flat = values.reshape(-1)
        chunks = [packed(flat[start : start + chunk]) for start in range(0, flat.size, chunk)]
        return {
            "__msgpack_chunked_array__": True,
            "shape": {str(dim): size for dim, size in enumerate(values.shape)},
            "chunks": {str(number): part for number, part in enumerate(chunks)},
        }

    parts: list[dict[str, Any]] = [{}, {}]
    files = {}
    for number, (name, values) in enumerate(_transposed(model).items()):
        path = _other_name(name, {"weight": "kernel"}, {"weight": "scale"}).replace("layers.", "layers/")
        path = path.replace("embed_tokens/weight", "embed_tokens/embedding")
        path = path.replace("embed_positions/weight", "embed_positions/embedding")
        which = number % 2 if layout == "split" else 0
        files[path] = f"flax_model-0000{1 + which}-of-00002.msgpack"
        tree = parts[which]
        *above, last = path.split("/")
        for key in above:
            tree = tree.setdefault(key, {})
        tree[last] = leaf(values)
    if layout == "single":
        (folder / "flax_model.msgpack").write_bytes(msgpack.packb(parts[0], strict_types=True))
        return
    for which, tree in enumerate(parts):
        (folder / f"flax_model-0000{1 + which}-of-00002.msgpack").write_bytes(msgpack.packb(tree, strict_types=True))
    _write_index(folder / "flax_model.msgpack.index.json", files)


def _transposed(model: Any) -> dict[str, Any]:
    """The parameters of `model` as NumPy arrays, with matrices transposed to (in, out).

    NumPy has no bfloat16, so arrays of this dtype have the dtype uint16."""
    arrays = {}
    for name, tensor in model.named_parameters():
        product = tensor.ndim == 2 and "embed_" not in name
        values = (tensor.detach().T if product else tensor.detach()).contiguous()
        arrays[name] = (values.view(torch.int16) if values.dtype is torch.bfloat16 else values).numpy()
    return arrays


def _other_name(name: str, product: dict[str, str], norm: dict[str, str]) -> str:
    *above, last = name.split(".")
    words = norm if "layer_norm" in above[-1] else {} if "embed_" in above[-1] else product
    return "/".join([*above, words.get(last, last)]).replace("layers/", "layers.")


def _write_config(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)


def _write_index(path: Path, files: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": files}))
