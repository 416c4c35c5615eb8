"""A checkpoint → a Hugging Face folder. One file's tensors are in memory at a time."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opt_parallel.checkpoint.reading import Opened, open_checkpoint
from opt_parallel.errors import UserError
from opt_parallel.model.heads import CausalLM
from opt_parallel.model.hf import CONFIG, INDEX, WEIGHTS, config_for_hf, to_hf
from opt_parallel.parallel.shard import Shard, marked
from opt_parallel.topology import ALONE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
TOKENIZER_FILES = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` (decimal, as Hugging Face counts)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text} is no size: write a number and KB, MB, GB or TB, such as 5GB")
    return size


def export(checkpoint: Path, output: Path, max_shard_size: int, dtype: str) -> None:
    """Write `checkpoint` to `output` as OPTForCausalLM reads it: whole or absent.

    A tied head is not written twice, vocabulary padding not at all. Raises: UserError."""
    if output.exists():
        raise UserError(f"--output {output} exists: remove it or choose another folder")
    opened = open_checkpoint(checkpoint)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_weights(opened, partial, max_shard_size, DTYPES[dtype])
        _write_json(partial / CONFIG, config_for_hf(opened.config, DTYPES[dtype]))
        _write_json(partial / "generation_config.json", _generation_config(opened))
        for file in opened.tokenizer.iterdir():
            if file.name in TOKENIZER_FILES:
                shutil.copy(file, partial / file.name)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _generation_config(opened: Opened) -> dict[str, Any]:
    model = opened.config
    return {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }


def _write_weights(opened: Opened, folder: Path, max_shard_size: int, dtype: torch.dtype) -> None:
    files = _plan(opened, max_shard_size, dtype)
    weight_map, total = {}, 0
    for number, parts in enumerate(files, start=1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for ours, shard in parts:
            for theirs, values in to_hf(ours, opened.weights(ours, shard)).items():
                tensors[theirs] = values.to(dtype).contiguous()
                weight_map[theirs] = name
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan(opened: Opened, max_shard_size: int, dtype: torch.dtype) -> list[list[tuple[str, Shard]]]:
    """Which parameters go into which file: in order, each file filled up to the limit."""
    with torch.device("meta"):
        model = CausalLM(opened.config, ALONE)
    files: list[list[tuple[str, Shard]]] = []
    room = -math.inf
    for name, _, shard in marked(model):
        size = shard.numel * dtype.itemsize
        if size > room:
            files.append([])
            room = max_shard_size
        files[-1].append((name, shard))
        room -= size
    return files


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
