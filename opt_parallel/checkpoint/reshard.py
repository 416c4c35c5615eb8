"""Logical tensors from the parts that ranks wrote, whatever their layout was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opt_parallel.errors import UserError
from opt_parallel.manifest import read_manifest
from opt_parallel.parallel.shard import Shard, overlap, require_same_tensors


def weights_file(tensor_rank: int) -> str:
    """Name of the file with a tensor rank's part of every weight."""
    return f"weights-{tensor_rank:05d}.safetensors"


class CheckpointWeights:
    """A source for `fill`: reads from the parts on disk just what a shard needs, as slices of mapped files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, dict[str, Any]] = read_manifest(folder)["tensors"]

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless exactly the tensors `wanted` are there."""
        held = {name: tuple(saved["shape"]) for name, saved in self.tensors.items()}
        require_same_tensors(str(self.folder), wanted, held)

    def holds(self, name: str) -> bool:
        """Whether there is a logical tensor of that name."""
        return name in self.tensors

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The values of `shard.range` of the logical tensor `name`, fp32. Raises: UserError if a file is damaged."""
        saved = self.tensors[name]
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
