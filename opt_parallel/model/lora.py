"""LoRA on OPT: the linear layers that get a LoRA term, and the terms' names and tensors in a PEFT adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opt_parallel.config.task import LoraConfig
from opt_parallel.huggingface.names import hf_names
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.opt import Block

ADAPTER_WEIGHTS = "adapter_model.safetensors"
QKV = ("q_proj", "k_proj", "v_proj")  # the blocks of qkv_proj


def qkv_blocks(targets: list[str]) -> tuple[int, ...]:
    """The blocks of qkv_proj (0: query, 1: key, 2: value) that are among `targets`."""
    return tuple(block for block, name in enumerate(QKV) if name in targets)


def adapt(model: CausalLM | SequenceClassifier, lora: LoraConfig) -> None:
    """Add LoRA terms to the layers that `lora` names, and freeze everything else except a classifier's score."""
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
    """The names of A and B for the weight `name`."""
    layer = name.removesuffix(".weight")
    return f"{layer}.lora_a", f"{layer}.lora_b"


def to_peft(name: str, values: Tensor, targets: list[str]) -> dict[str, Tensor]:
    """Our trained logical tensor under the names that `peft` uses in an adapter of these targets.

    They refer to Hugging Face's layers, in which query, key and value are separate."""
    layers = [f"base_model.model.{layer}" for layer in hf_names(name)]
    for ours, theirs in ((".lora_a", ".lora_A.weight"), (".lora_b", ".lora_B.weight")):
        layers = [layer.removesuffix(ours) + theirs if layer.endswith(ours) else layer for layer in layers]
    if len(layers) == 1:
        return {layers[0]: values}
    kept = [layers[block] for block in qkv_blocks(targets)]
    return dict(zip(kept, values, strict=True))


def config_for_peft(lora: LoraConfig, base: str | None, classifier: bool) -> dict[str, Any]:
    """The content of adapter_config.json, with the keys of `peft.LoraConfig`. `base`: a folder or hub id that
    transformers can load."""
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
