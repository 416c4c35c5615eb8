"""Writes a small OPT in the forms of metaseq's checkpoints, with torch.save, and the same OPT for transformers.

Flat tensors are cut as fairscale's FSDP cuts them: into ⌈numel / shards⌉ elements each, with zeros after the last one.

python tests/support/metaseq_forms.py FORM FOLDER [LAYERS]

writes 2 parts, each of 4 shards if FORM is raw, of a network with the width of OPT-1.3b and 6 layers: 0.8 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf, flag_override
from torch import Tensor

FORMS = ("raw", "flat", "flat_one", "views", "stale", "fused", "singleton", "bare", "iml", "arrays", "args")
PREFIX = "model.decoder."
State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """The sizes of a network. With `post_norm` it is a small OPT-350m: projections, and no last LayerNorm."""

    layers: int = 2
    hidden: int = 32
    heads: int = 8
    ffn: int = 64
    rows: int = 96
    positions: int = 24
    post_norm: bool = False

    @property
    def width(self) -> int:
        return self.hidden // 2 if self.post_norm else self.hidden


def weights_of(size: Size, seed: int = 0, dtype: torch.dtype = torch.float16) -> State:
    """Random weights with transformers' names."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1 + mean).to(dtype)

    hidden, ffn = size.hidden, size.ffn
    out = {
        "embed_tokens.weight": drawn(size.rows, size.width),
        "embed_positions.weight": drawn(size.positions + 2, hidden),
    }
    if size.post_norm:
        out |= {"project_in.weight": drawn(hidden, size.width), "project_out.weight": drawn(size.width, hidden)}
    else:
        out |= {"final_layer_norm.weight": drawn(hidden, mean=1.0), "final_layer_norm.bias": drawn(hidden)}
    for layer in range(size.layers):
        name = f"layers.{layer}."
        for which in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= {f"{name}self_attn.{which}.weight": drawn(hidden, hidden)}
            out |= {f"{name}self_attn.{which}.bias": drawn(hidden)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            out |= {f"{name}{norm}.weight": drawn(hidden, mean=1.0), f"{name}{norm}.bias": drawn(hidden)}
        out |= {f"{name}fc1.weight": drawn(ffn, hidden), f"{name}fc1.bias": drawn(ffn)}
        out |= {f"{name}fc2.weight": drawn(hidden, ffn), f"{name}fc2.bias": drawn(hidden)}
    return {PREFIX + name: values for name, values in out.items()}


def write_hugging_face(folder: Path, size: Size, weights: State) -> None:
    """Write the folder that transformers reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": size.rows, "hidden_size": size.hidden,
        "word_embed_proj_dim": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "ffn_dim": size.ffn, "max_position_embeddings": size.positions, "do_layer_norm_before": not size.post_norm,
        "dropout": 0.1, "attention_dropout": 0.1, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def part_of(weights: State, part: int, parts: int) -> State:
    """The tensors of a model part with metaseq's names, in metaseq's order, with query, key and value fused."""
    rows = lambda name: weights[PREFIX + name].chunk(parts, 0)[part]  # noqa: E731
    columns = lambda name: weights[PREFIX + name].chunk(parts, 1)[part]  # noqa: E731
    whole = lambda name: weights[PREFIX + name]  # noqa: E731
    out = {f"{name}.weight": of(f"{name}.weight") for name, of in (("embed_tokens", rows), ("embed_positions", whole))}
    for ours, theirs in (("project_in", "project_in_dim"), ("project_out", "project_out_dim")):
        if f"{PREFIX}{ours}.weight" in weights:
            out[f"{theirs}.weight"] = whole(f"{ours}.weight")
    layer = 0
    while f"{PREFIX}layers.{layer}.fc1.weight" in weights:
        name = f"layers.{layer}."
        for kind in ("weight", "bias"):
            fused = [rows(f"{name}self_attn.{which}_proj.{kind}") for which in "kvq"]
            out[f"{name}self_attn.qkv_proj.{kind}"] = torch.cat(fused)
        out[f"{name}self_attn.out_proj.weight"] = columns(f"{name}self_attn.out_proj.weight")
        out[f"{name}self_attn.out_proj.bias"] = whole(f"{name}self_attn.out_proj.bias")
        for kind in ("weight", "bias"):
            out[f"{name}self_attn_layer_norm.{kind}"] = whole(f"{name}self_attn_layer_norm.{kind}")
        out |= {f"{name}fc1.{kind}": rows(f"{name}fc1.{kind}") for kind in ("weight", "bias")}
        out |= {f"{name}fc2.weight": columns(f"{name}fc2.weight"), f"{name}fc2.bias": whole(f"{name}fc2.bias")}
        for kind in ("weight", "bias"):
            out[f"{name}final_layer_norm.{kind}"] = whole(f"{name}final_layer_norm.{kind}")
        layer += 1
    if f"{PREFIX}final_layer_norm.weight" in weights:
        out |= {f"layer_norm.{kind}": whole(f"final_layer_norm.{kind}") for kind in ("weight", "bias")}
    return {f"decoder.{name}": values.contiguous() for name, values in out.items()}


def apart(part: State) -> State:
    """The tensors of a part with query, key and value as separate tensors."""
    out: State = {}
    for name, values in part.items():
        if ".qkv_proj." in name:
            thirds = zip("kvq", values.chunk(3), strict=True)
            out |= {name.replace("qkv_proj", f"{which}_proj"): third.clone() for which, third in thirds}
        else:
            out[name] = values
    return out


def modules_of(part: State, one: bool) -> dict[str, list[str]]:
    """The names in each flat tensor, by the path of the module: the root and the layers, or the root alone."""
    modules: dict[str, list[str]] = {"": []}
    for name in part:
        layer = ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") and not one else ""
        modules.setdefault(layer, []).append(name)
    return modules


def flattened(part: State, one: bool) -> State:
    """The flat tensors of a part."""
    return {
        f"{path}.flat_param_0" if path else "flat_param_0": torch.cat([part[name].flatten() for name in names])
        for path, names in modules_of(part, one).items()
    }


def metadata_of(part: State, one: bool = False) -> dict[str, Any]:
    """The shard_metadata of a part."""
    entries = []
    for path, names in modules_of(part, one).items():
        about = {
            "names": [name.removeprefix(f"{path}.") if path else name for name in names],
            "shapes": [part[name].shape for name in names], "numels": [part[name].numel() for name in names],
            "padding": 0,
        }  # fmt: skip
        entries.append({"fsdp_path": path, "params": {"flat_param_0": about}, "no_broadcast_optim_state": False,
                        "shared_param_info": []})  # fmt: skip
    return {"param_metadata": entries, "buffer_names": ["decoder.version"]}


def cut(flat: Tensor, shard: int, shards: int) -> Tensor:
    """A shard of a flat tensor, as fairscale cuts it."""
    length = -(-flat.numel() // shards)
    padded = torch.cat([flat, flat.new_zeros(length * shards - flat.numel())])
    return padded[shard * length : (shard + 1) * length].clone()


def namespace(size: Size, parts: int) -> argparse.Namespace:
    return argparse.Namespace(
        arch="transformer_lm_megatron", decoder_layers=size.layers, decoder_embed_dim=size.hidden,
        decoder_ffn_embed_dim=size.ffn, decoder_attention_heads=size.heads, decoder_normalize_before=not size.post_norm,
        no_scale_embedding=True, activation_fn="relu", tokens_per_sample=size.positions, dropout=0.1,
        attention_dropout=0.1, model_parallel_size=parts,
    )  # fmt: skip


def around(size: Size, parts: int) -> dict[str, Any]:
    """What metaseq's trainer stores beside the weights."""
    return {
        "cfg": {"_name": None, "common": {"fp16": True, "model_parallel_size": 8}, "model": namespace(size, parts)},
        "criterion": None, "optimizer_history": [{"optimizer_name": "MemoryEfficientFP16Optimizer", "num_updates": 7}],
        "task_state": {}, "extra_state": {"train_iterator": {"epoch": 1}},
    }  # fmt: skip


def omegaconf_around(size: Size) -> dict[str, Any]:
    node = OmegaConf.create({}, flags={"allow_objects": True})
    with flag_override(node, "allow_objects", True):
        for key, value in around(size, 1)["cfg"].items():
            node[key] = value
    return {**around(size, 1), "cfg": node}


VERSION = {"decoder.version": torch.tensor([3.0], dtype=torch.float16)}


def write(form: str, folder: Path, size: Size, weights: State, parts: int = 2, shards: int = 3) -> None:
    """Write the weights in a form. The forms of one file ignore `parts`, and only `raw` has shards."""
    folder.mkdir(parents=True)
    if form in WRITERS:
        WRITERS[form](folder, size, part_of(weights, 0, 1))
        return
    for part in range(parts):
        own, about = part_of(weights, part, parts), around(size, parts)
        if form == "raw":
            _write_shards(folder, part, own, about, shards)
            continue
        name = f"reshard-model_part-{part}.pt" if form != "iml" else f"checkpoint_1_4000.pt-model_part-{part}.pt"
        if form in ("flat", "flat_one"):
            own = flattened(own, form == "flat_one")
        if form == "views":
            about["shard_metadata"], own = metadata_of(own), _views(own)
        if form == "stale":
            about["shard_metadata"] = metadata_of(part_of(weights, 0, 4 if parts != 4 else 2))
        torch.save({"model": {**own, **VERSION}, **about}, folder / name)


def _write_shards(folder: Path, part: int, own: State, about: dict[str, Any], shards: int) -> None:
    moments = {"last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    for shard in range(shards):
        state = {name: cut(flat, shard, shards) for name, flat in flattened(own, False).items()}
        content = {**about, "model": {**state, **VERSION}, "shard_metadata": metadata_of(own), **moments}
        torch.save(content, folder / f"checkpoint_last-model_part-{part}-shard{shard}.pt")


def _views(part: State) -> State:
    """The tensors of a part as views of one storage for each module."""
    out: State = {}
    for path, flat in flattened(part, False).items():
        names = modules_of(part, False)[path.removesuffix("flat_param_0").removesuffix(".")]
        pieces = flat.split([part[name].numel() for name in names])
        out |= {name: piece.view(part[name].shape) for name, piece in zip(names, pieces, strict=True)}
    return out


def _write_fused(folder: Path, size: Size, whole: State) -> None:
    content = {"model": {**whole, **VERSION}, **around(size, 1), "args": None, "shard_metadata": None}
    torch.save(content, folder / "reshard-model_part-0.pt")


def _write_singleton(folder: Path, size: Size, whole: State) -> None:
    torch.save({**omegaconf_around(size), "model": {**apart(whole), **VERSION}}, folder / "restored.pt")


def _write_bare(folder: Path, size: Size, whole: State) -> None:
    torch.save(apart(whole), folder / "restored.pt")


def _write_args(folder: Path, size: Size, whole: State) -> None:
    tied = {"decoder.output_projection.weight": whole["decoder.embed_tokens.weight"]}
    torch.save({"args": namespace(size, 1), "model": {**apart(whole), **tied}}, folder / "reshard.pt")


def _write_arrays(folder: Path, size: Size, whole: State) -> None:
    for name, values in apart(whole).items():
        with open(folder / name, "wb") as file:
            np.save(file, values.numpy())


WRITERS = {
    "fused": _write_fused, "singleton": _write_singleton, "bare": _write_bare, "args": _write_args,
    "arrays": _write_arrays,
}  # fmt: skip


if __name__ == "__main__":
    form, folder, *layers = sys.argv[1:]
    wide = Size(int(layers[0]) if layers else 6, hidden=2048, heads=32, ffn=8192, rows=50272, positions=2048)
    write(form, Path(folder), wide, weights_of(wide), parts=2, shards=4)
