"""Arguments of transformers' `from_pretrained` and `save_pretrained` that have no effect here, or are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opt_parallel.parallel.topology import local_device
from opt_parallel.runtime.errors import WrongArgument

# Memory is always low, interrupted downloads always continue, no code of a checkpoint ever runs.
NO_EFFECT = (
    "low_cpu_mem_usage", "trust_remote_code", "weights_only", "resume_download", "attn_implementation", "_fast_init",
    "save_function", "save_peft_format",
)  # fmt: skip
NOT_SUPPORTED = "it is not supported; leave it out"
# Arguments that are refused unless they are None, False or empty, with the way out.
REFUSED = {
    "state_dict": "the weights are the model's own: call load_state_dict(…) on the model, and leave it out",
    "output_loading_info": "a model is loaded completely or not at all: leave it out",
    "return_unused_kwargs": "an unknown argument becomes an attribute of the configuration: leave it out",
    "generation_config": "set model.generation_config after loading",
    "force_download": "remove the download from the cache, or choose another cache_dir",
    "use_auth_token": "its name is token",
    "push_to_hub": "call push_to_hub(repo_id) of the model",
    "subfolder": "give the path of the folder itself",
    "variant": "files of variants are neither read nor written; choose dtype=",
    "tp_plan": "give the tensor group: tensor=topology.tensor",
    "quantization_config": "weights are not quantized: choose dtype=",
    "load_in_8bit": "weights are not quantized: choose dtype=",
    "load_in_4bit": "weights are not quantized: choose dtype=",
    "max_memory": "give the device: device_map=, or a tensor group",
    "offload_folder": NOT_SUPPORTED,
    "offload_state_dict": NOT_SUPPORTED,
    "proxies": "set the environment variable HTTPS_PROXY",
    "mirror": "set the environment variable HF_ENDPOINT",
    "gguf_file": NOT_SUPPORTED,
    "adapter_kwargs": NOT_SUPPORTED,
    "key_mapping": NOT_SUPPORTED,
}


def without_effect(where: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` without those of transformers that have no effect. Raises: WrongArgument for one that would."""
    for name, why in REFUSED.items():
        if arguments.get(name):
            raise WrongArgument(f"{where}: {name}={arguments[name]!s:.40}: {why}")
    return {name: value for name, value in arguments.items() if name not in NO_EFFECT and name not in REFUSED}


def place_of(device: torch.device | str, device_map: Any) -> torch.device:
    """The one device that `device_map`, or else `device`, names. Raises: WrongArgument."""
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map == "auto":
        return local_device()
    if isinstance(device_map, Mapping) or device_map in ("balanced", "balanced_low_0", "sequential"):
        raise WrongArgument(
            f"device_map={device_map!s:.80} divides the layers: name one device, or give a tensor group, which splits "
            "each layer"
        )
    return torch.device(device if device_map is None else device_map)
