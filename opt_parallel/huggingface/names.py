"""Translates between the parameters of this package and those of Hugging Face's OPT, one tensor or slice at a time.

Hugging Face has separate parameters for query, key and value. In this package they are the three blocks of one
parameter. All other parameters correspond one to one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from opt_parallel.huggingface.arrays import Ranges
from opt_parallel.huggingface.config import CONFIG
from opt_parallel.huggingface.hub import INDEX_SUFFIX
from opt_parallel.huggingface.hub import WEIGHTS as FORMATS
from opt_parallel.huggingface.weights import WeightFiles
from opt_parallel.parallel.shard import Shard, require_same_tensors
from opt_parallel.runtime.errors import UserError

WEIGHTS = FORMATS[0]
INDEX = WEIGHTS + INDEX_SUFFIX
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
QKV, PARTS = "qkv_proj", ("q_proj", "k_proj", "v_proj")  # The module in this package, and its parts in Hugging Face.
CHUNK = 1 << 22  # Number of values that are compared at a time.
HARMLESS = {"model.decoder.version"}  # A version counter of fairseq that early conversions kept.


def hf_names(name: str) -> list[str]:
    """Hugging Face's names for the parameter `name` of this package.

    The parameter that stacks query, key and value along dim 0 has three names. Other parameters have one name."""
    theirs = f"model.{name}" if name.startswith("decoder.") else name
    if f".{QKV}." not in name:
        return [theirs]
    return [theirs.replace(QKV, part) for part in PARTS]


def to_hf(name: str, values: Tensor) -> dict[str, Tensor]:
    """The full tensor `name` of this package as tensors with Hugging Face's names."""
    names = hf_names(name)
    parts = [values] if len(names) == 1 else list(values.unbind(0))
    return dict(zip(names, parts, strict=True))


def compare_values(one: Tensor, other: Tensor) -> tuple[int, float]:
    """The number of values that differ between two tensors of equal shape, and the largest difference.

    A NaN equals a NaN. Tensors of different dtypes are compared in the wider dtype. The comparison is in chunks, so its
    memory does not grow with the tensors.
    """
    count, largest = 0, []
    for a, b in zip(one.flatten().split(CHUNK), other.flatten().split(CHUNK), strict=True):
        if differing := int((~((a == b) | (a.isnan() & b.isnan()))).sum()):
            count += differing
            largest.append((a - b).abs().max())
    return count, float(torch.stack(largest).max()) if largest else 0.0


class HuggingFaceWeights:
    """Reads the weights of a Hugging Face folder, in any of its formats. Only the requested slices are read.

    In files of the bare decoder (OPTModel), the names lack the prefix `model.`, which this class adds.
    """

    def __init__(self, folder: Path, formats: tuple[str, ...] = FORMATS) -> None:
        """Open the weight files in one of the `formats`. Raises: UserError if a file is missing or damaged."""
        self.files = WeightFiles(folder, formats)
        self.dtype = self.files.dtype
        self.folder = folder
        self.stored: dict[str, str] = {}
        for name in self.files.shapes:
            theirs = f"model.{name}" if name.startswith("decoder.") else name
            if theirs in self.stored:
                raise UserError(f"{folder} contains {name} twice, also as {self.stored[theirs]}: use a complete copy")
            self.stored[theirs] = name

    def check_layers(self, layers: int) -> None:
        """Raise UserError if the files have too few tensors for this number of layers, before memory is allocated."""
        if layers > len(self.stored):
            raise UserError(
                f"{self.folder}: {CONFIG} says num_hidden_layers={layers}, but the files contain only "
                f"{len(self.stored)} tensors: use a complete copy"
            )

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the files contain exactly the full tensors `wanted`.

        The files may also contain an output projection (`lm_head`) with the shape of the embedding."""
        theirs: dict[str, tuple[int, ...]] = {}
        for name, shape in wanted.items():
            names = hf_names(name)
            theirs.update(dict.fromkeys(names, shape if len(names) == 1 else shape[1:]))
        if HEAD in self.stored:
            theirs[HEAD] = theirs[EMBEDDING]
        held = {name: self.files.shapes[stored] for name, stored in self.stored.items() if name not in HARMLESS}
        require_same_tensors(str(self.folder), theirs, held)

    def holds(self, name: str) -> bool:
        """Whether the files contain the full tensor `name`."""
        return all(part in self.stored for part in hf_names(name))

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The elements `shard.range` of the full tensor `name` of this package.

        Raises: UserError if a file is damaged, or if the output projection is not tied to the embedding."""
        names = hf_names(name)
        if len(names) > 1:
            return torch.stack([self._read(part, shard.range[1:]) for part in names])
        values = self._read(names[0], shard.range)
        if names[0] == EMBEDDING and HEAD in self.stored:
            self._require_tied(values, self._read(HEAD, shard.range))
        return values

    def _read(self, name: str, ranges: Ranges) -> Tensor:
        return self.files.read(self.stored[name], ranges)

    def _require_tied(self, embedding: Tensor, head: Tensor) -> None:
        """Raise UserError unless output projection and embedding have equal values.

        The dtypes of the two tensors may differ, and a NaN equals a NaN."""
        if compare_values(embedding, head)[0]:
            raise UserError(
                f"{self.folder}: {HEAD} differs from {EMBEDDING}, but OPT uses the same weights for both: a separate "
                "output projection is not supported"
            )
