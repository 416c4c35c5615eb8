"""Adds LoRA terms to the linear layers of OPT, and translates these terms into the tensors of a PEFT adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opt_parallel.config.task import LoraConfig
from opt_parallel.huggingface.names import hf_names
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.opt import Block

ADAPTER_WEIGHTS = "adapter_model.safetensors"
QKV = ("q_proj", "k_proj", "v_proj")  # the order of query, key and value in qkv_proj


def qkv_blocks(targets: list[str]) -> tuple[int, ...]:
    """The blocks of qkv_proj (0 is query, 1 is key, 2 is value) that get a LoRA term according to `targets`."""
    return tuple(block for block, name in enumerate(QKV) if name in targets)


def adapt(model: CausalLM | SequenceClassifier, lora: LoraConfig) -> None:
    """Add LoRA terms to the layers that `lora` names, and freeze all other parameters except a classifier's score."""
    model.requires_grad_(False)
    for layer in model.decoder.layers:
        assert isinstance(layer, Block)
        if blocks := qkv_blocks(lora.targets):
            layer.self_attn.qkv_proj.adapt(lora.rank, lora.alpha, blocks)
        if "out_proj" in lora.targets:
            layer.self_attn.out_proj.adapt(lora.rank, lora.alpha)
        if "fc1" in lora.targets:
            layer.fc1.adapt(lora.rank, lora.alpha)
        if "fc2" in lora.targets:
            layer.fc2.adapt(lora.rank, lora.alpha)
    if isinstance(model, SequenceClassifier):
        model.score.requires_grad_(True)


def terms_of(name: str) -> tuple[str, str]:
    """The names of the LoRA matrices A and B of the weight `name`."""
    layer = name.removesuffix(".weight")
    return f"{layer}.lora_a", f"{layer}.lora_b"


def to_peft(name: str, values: Tensor, targets: list[str]) -> dict[str, Tensor]:
    """A trained full tensor `values`, under the names that `peft` gives it in an adapter with these targets.

    The tensor of query, key and value becomes up to three tensors, because Hugging Face's layers are separate."""
    layers = [f"base_model.model.{layer}" for layer in hf_names(name)]
    for ours, theirs in ((".lora_a", ".lora_A.weight"), (".lora_b", ".lora_B.weight")):
        layers = [layer.removesuffix(ours) + theirs if layer.endswith(ours) else layer for layer in layers]
    if len(layers) == 1:
        return {layers[0]: values}
    kept = [layers[block] for block in qkv_blocks(targets)]
    return dict(zip(kept, values, strict=True))


def config_for_peft(lora: LoraConfig, base: str | None, classifier: bool) -> dict[str, Any]:
    """The content of adapter_config.json, with the keys of `peft.LoraConfig`.

    `base` is the folder or hub id of the base model, which transformers can load."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(lora.targets),
        "modules_to_save": ["score"] if classifier else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
