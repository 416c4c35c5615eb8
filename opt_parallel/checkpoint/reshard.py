"""Logical tensors from the parts that ranks wrote, whatever their layout was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opt_parallel.errors import UserError
from opt_parallel.parallel.shard import Shard, overlap

MANIFEST = "manifest.json"


def weights_file(tensor_rank: int) -> str:
    """Name of the file with a tensor rank's part of every weight."""
    return f"weights-{tensor_rank:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of itself.

    Raises: UserError if `folder` is no checkpoint of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint: {MANIFEST} cannot be read ({error})") from error
    assert isinstance(manifest, dict)
    return manifest


class CheckpointWeights:
    """A source for `fill`: reads from the parts on disk just what a shard needs, as slices of mapped files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, dict[str, Any]] = read_manifest(folder)["tensors"]

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The values of `shard.range` of the logical tensor `name`, fp32.

        Raises: UserError if the checkpoint lacks the tensor or holds another shape."""
        saved = self.tensors.get(name)
        if saved is None or tuple(saved["shape"]) != shard.shape:
            held = "nothing of that name" if saved is None else f"shape {tuple(saved['shape'])}"
            raise UserError(f"{self.folder} holds {held} for {name}, the model wants shape {shard.shape}")
        values = torch.empty([part.stop - part.start for part in shard.range])
        for index in range(saved["count"]):
            written = Shard(shard.shape, saved["dim"], index, saved["count"], shard.initial, shard.decay)
            self._copy_overlap(values, name, shard, written)
        return values

    def _copy_overlap(self, values: Tensor, name: str, shard: Shard, written: Shard) -> None:
        shared = overlap(shard.range, written.range)
        if shared is None:
            return
        into, out_of = shared
        path = self.folder / weights_file(written.index)
        try:
            with safe_open(path, framework="pt") as file:
                values[into] = file.get_slice(name)[out_of]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
