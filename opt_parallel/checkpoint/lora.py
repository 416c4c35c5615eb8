"""Reads checkpoints of LoRA runs, which contain only trained tensors and need the weights of a base checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.config.model import ModelConfig
from opt_parallel.config.paths import absolute
from opt_parallel.config.task import LoraConfig
from opt_parallel.model.heads import CausalLM
from opt_parallel.model.lora import qkv_blocks, terms_of
from opt_parallel.parallel.lora import merge
from opt_parallel.parallel.shard import Constant, Shard, Source, logical_shapes, require_same_tensors
from opt_parallel.parallel.topology import ALONE

CORNER = 8  # number of elements along each dim of a tensor that are included in the checksum of the base


class Weights(Protocol):
    """Weights of an open checkpoint, which `fill` reads into a model. All weights can be represented in `dtype`."""

    dtype: torch.dtype

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None: ...

    def holds(self, name: str) -> bool: ...

    def __call__(self, name: str, shard: Shard) -> Tensor: ...


@dataclass(frozen=True)
class Base:
    """The base checkpoint that a LoRA run adapts: its folder or hub id, and a checksum of its values."""

    checkpoint: str
    checksum: str

    @classmethod
    def of(cls, name: str, config: ModelConfig, weights: Source) -> Base:
        """The base checkpoint `name` with the network `config` and these `weights`.

        The checksum is the CRC-32 of some elements of each tensor in fp32. So little data is read, and the checksum
        detects another training of the network, but not every single changed value. Raises: UserError if a file is
        damaged."""
        with torch.device("meta"):
            shapes = logical_shapes(CausalLM(config, ALONE))
        checksum = 0
        for tensor, shape in sorted(shapes.items()):
            corner = weights(tensor, _Corner(shape, 0, 0, 1, Constant(0), False)).float().contiguous()
            checksum = zlib.crc32(corner.numpy().tobytes(), checksum)
        return cls(absolute("", name), f"{checksum:08x}")


class _Corner(Shard):
    """The first CORNER elements of a tensor along each dim."""

    @property
    def range(self) -> tuple[slice, ...]:
        return tuple(slice(0, min(size, CORNER)) for size in self.shape)


class Merged:
    """The merged weights W + alpha / rank · B A of a LoRA run, computed only for the requested elements.

    Other trained tensors are read from the checkpoint of the LoRA run, and all remaining tensors from the base."""

    def __init__(self, base: Weights, trained: CheckpointReader, lora: LoraConfig) -> None:
        self.base, self.trained, self.lora = base, trained, lora
        self.dtype = torch.float32  # the dtype of the merged weights

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the base and the LoRA checkpoint together contain exactly the tensors `wanted`.

        If the two checkpoints contain the same tensor, the tensor of the LoRA checkpoint is used."""
        other = {name: shape for name, shape in self.trained.shapes.items() if ".lora_" not in name}
        here = {name: shape for name, shape in wanted.items() if name in other}
        require_same_tensors(str(self.trained.folder), here, other)
        self.base.check({name: shape for name, shape in wanted.items() if name not in other or self.base.holds(name)})

    def holds(self, name: str) -> bool:
        """Whether the base or the LoRA checkpoint contains the full tensor `name`."""
        return self.trained.holds(name) or self.base.holds(name)

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The elements `shard.range` of the full tensor `name` in fp32. Raises: UserError if a file is damaged."""
        if self.trained.holds(name):
            return self.trained(name, shard)
        values = self.base(name, shard).float()
        a, b = terms_of(name)
        if not self.trained.holds(a):
            return values
        values = values.clone()  # the values may be a view of a memory-mapped file
        *outer, rows, columns = shard.range
        products = [(values, outer)]
        if outer:  # the tensor contains query, key and value
            products = [(values[n], [slice(k, k + 1)]) for k, n in enumerate(qkv_blocks(self.lora.targets))]
        rank = slice(0, self.lora.rank)
        for weight, block in products:
            part_of_a = self.trained.read("weights", a, (*block, rank, columns)).view(self.lora.rank, -1)
            part_of_b = self.trained.read("weights", b, (*block, rows, rank)).view(-1, self.lora.rank)
            merge(weight, part_of_a, part_of_b, self.lora.alpha / self.lora.rank)
        return values


def with_fallback(holds: Callable[[str], bool], weights: Source, fallback: Source) -> Source:
    """A source that reads a tensor from `weights` if `holds(name)` is true, and otherwise from `fallback`."""
    return lambda name, shard: weights(name, shard) if holds(name) else fallback(name, shard)


def lora_of(manifest: dict[str, Any]) -> LoraConfig:
    """The LoRA settings of the run that saved a checkpoint. The rank is 0 if the run trained all weights."""
    saved = manifest["config"].get("task", {}).get("lora", {})
    return LoraConfig(**{name: saved[name] for name in ("rank", "alpha", "targets") if name in saved})
