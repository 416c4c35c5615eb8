"""Describes which part of a full tensor each parameter of a tensor-parallel model holds.

The full tensor is the same parameter of an unsplit model, which names of functions call `logical`. The description
(`Shard`) is an attribute of the parameter, called its mark. All other code reads the mark, and never derives it from a
parameter's name.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opt_parallel.parallel.collectives import all_gather_last
from opt_parallel.parallel.topology import Group
from opt_parallel.runtime.errors import UserError

TILE = 1024  # random initial values are generated in tiles of TILE × TILE elements


@dataclass(frozen=True)
class Normal:
    """Initial values from the normal distribution N(0, std²), except for row `zero_row`, which is zero."""

    std: float
    zero_row: int | None = None


@dataclass(frozen=True)
class Constant:
    """Initial values that are all equal to `value`."""

    value: float


@dataclass(frozen=True)
class Shard:
    """Part `index` of a full (unsplit) tensor of `shape` that is split along `dim` into `count` parts.

    Every part has the same size, ⌈size / count⌉. If `count` does not divide the size, the rows beyond the end of the
    full tensor are padding. Padding is zero, and it is never counted, saved or trained.
    """

    shape: tuple[int, ...]
    dim: int
    index: int
    count: int
    initial: Normal | Constant
    decay: bool

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this part, including padding."""
        size = -(-self.shape[self.dim] // self.count)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    @property
    def range(self) -> tuple[slice, ...]:
        """The slices of the full (unsplit) tensor that this part holds."""
        size, end = self.local_shape[self.dim], self.shape[self.dim]
        part = slice(min(self.index * size, end), min((self.index + 1) * size, end))
        return tuple(part if dim == self.dim else slice(0, full) for dim, full in enumerate(self.shape))

    @property
    def real(self) -> tuple[slice, ...]:
        """The slices of the local tensor that select all elements except padding."""
        return tuple(slice(0, part.stop - part.start) for part in self.range)

    @property
    def numel(self) -> int:
        """Number of elements of the full (unsplit) tensor."""
        return math.prod(self.shape)

    def index_of(self, local: Tensor) -> Tensor:
        """The indices in the flattened full tensor of the elements `local` of this flattened part.

        The indices of padding have no meaning."""
        row = math.prod(self.shape[self.dim + 1 :])
        part, full = self.local_shape[self.dim] * row, self.shape[self.dim] * row
        return local // part * full + self.index * part + local % part


Source = Callable[[str, Shard], Tensor]
"""A function `source(name, shard)` that returns the elements `shard.range` of the full (unsplit) tensor `name`."""


def parameter(shape: tuple[int, ...], initial: Normal | Constant, decay: bool, group: Group, dim: int) -> nn.Parameter:
    """An empty parameter for this rank's part of a tensor of `shape` that is split along `dim`, with its mark."""
    shard = Shard(shape, dim, group.rank, group.size, initial, decay)
    return mark(nn.Parameter(torch.empty(shard.local_shape)), shard)


def replicated(shape: tuple[int, ...], initial: Normal | Constant, decay: bool) -> nn.Parameter:
    """An empty parameter of which every rank of a tensor group holds a full copy, with its mark."""
    shard = Shard(shape, 0, 0, 1, initial, decay)
    return mark(nn.Parameter(torch.empty(shape)), shard)


def mark(tensor: nn.Parameter, shard: Shard) -> nn.Parameter:
    """Set the mark of a parameter."""
    tensor.shard = shard  # type: ignore[attr-defined]
    return tensor


def shard_of(tensor: nn.Parameter) -> Shard:
    """The mark of a parameter."""
    shard = tensor.shard  # type: ignore[attr-defined]
    assert isinstance(shard, Shard)
    return shard


def marked(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """The name, parameter and mark of each parameter. A tied parameter occurs once, under its first name."""
    for name, tensor in model.named_parameters():
        yield name, tensor, shard_of(tensor)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """The name, parameter and mark of each parameter that is not frozen."""
    return ((name, tensor, shard) for name, tensor, shard in marked(model) if tensor.requires_grad)


def logical_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the full (unsplit) tensors of all parameters, by name."""
    return {name: shard.shape for name, _, shard in marked(model)}


def trained_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the full (unsplit) tensors of all parameters that are not frozen, by name."""
    return {name: shard.shape for name, _, shard in trained(model)}


def require_same_tensors(where: str, wanted: dict[str, tuple[int, ...]], held: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError with the differences unless the tensors `held` in the folder `where` are exactly `wanted`."""
    wrong = [f"{name} is missing" for name in wanted if name not in held]
    wrong += [f"{name} is unexpected" for name in held if name not in wanted]
    shared = [name for name in wanted if name in held]
    wrong += [f"{name} has shape {held[name]}, not {wanted[name]}" for name in shared if held[name] != wanted[name]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{where} does not hold this network's weights: {'; '.join(wrong[:5])}{more}")


def logical_parameters(model: nn.Module) -> int:
    """Number of parameters of the unsplit model, without padding."""
    return sum(shard.numel for _, _, shard in marked(model))


def gather_parameter(tensor: Tensor, shard: Shard, group: Group) -> Tensor:
    """The full tensor, concatenated from its parts on the ranks of `group`, without a gradient.

    All ranks of the group must call this function."""
    if shard.count == 1:
        return tensor.detach()
    parts = all_gather_last(tensor.detach().movedim(shard.dim, -1), group).movedim(-1, shard.dim)
    return parts.narrow(shard.dim, 0, shard.shape[shard.dim])


def fill(
    model: nn.Module,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    on_filled: Callable[[nn.Module], None] = lambda module: None,
) -> None:
    """Allocate the parameters of a model on the meta device, and read this rank's parts of them from `source`.

    Parameters are read one after the other, so the peak memory exceeds the model by one tensor. After all parameters of
    a module are read, `on_filled(module)` is called. ZeRO-3 splits the parameters of the module in this call, so that
    no rank ever holds more than one unsplit module.
    """
    parameters: dict[nn.Parameter, nn.Parameter] = {}  # so that tied parameters are read once and remain tied
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, empty in own.items():
            if empty not in parameters:
                parameters[empty] = filled(empty, f"{prefix}.{name}" if prefix else name, source, device, dtype)
            setattr(module, name, parameters[empty])
        if own:
            on_filled(module)


def filled(empty: nn.Parameter, name: str, source: Source, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """A parameter with the mark of `empty`, and with this rank's part of the full tensor `name` from `source`."""
    shard = shard_of(empty)
    values = torch.zeros(shard.local_shape, dtype=dtype, device=device)
    values[shard.real].copy_(source(name, shard))
    return mark(nn.Parameter(values, requires_grad=empty.requires_grad), shard)


def zeros(name: str, shard: Shard) -> Tensor:
    """A source of zeros, without memory for them."""
    return torch.zeros(()).expand([part.stop - part.start for part in shard.range])


def random_source(seed: int) -> Source:
    """A source of random initial weights that do not depend on how tensors are split over ranks.

    The values of each tile of a tensor are generated on the CPU in float32. The generator is seeded by (seed, name,
    tile). A rank generates only the tiles that overlap its part, and needs memory for its part and one tile.
    """

    def source(name: str, shard: Shard) -> Tensor:
        values = torch.empty([part.stop - part.start for part in shard.range])
        if isinstance(shard.initial, Constant):
            return values.fill_(shard.initial.value)
        for tile in _tiles_touching(shard.range):
            _copy_tile(values, shard, tile, _generator(seed, name, tile))
        row = shard.initial.zero_row
        if row is not None and shard.range[0].start <= row < shard.range[0].stop:
            values[row - shard.range[0].start] = 0
        return values

    return source


def overlap(mine: tuple[slice, ...], theirs: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The intersection of two ranges of a tensor, relative to the start of each range, or None if it is empty."""
    common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(mine, theirs, strict=True)]
    if any(part.start >= part.stop for part in common):
        return None

    def within(ranges: tuple[slice, ...]) -> tuple[slice, ...]:
        return tuple(slice(c.start - r.start, c.stop - r.start) for c, r in zip(common, ranges, strict=True))

    return within(mine), within(theirs)


def _tile_size(ndim: int, dim: int) -> int:
    return TILE if dim >= ndim - 2 else 1


def _tiles_touching(ranges: tuple[slice, ...]) -> Iterator[tuple[int, ...]]:
    steps = [_tile_size(len(ranges), dim) for dim in range(len(ranges))]
    return itertools.product(
        *(range(part.start // step, -(-part.stop // step)) for part, step in zip(ranges, steps, strict=True))
    )


def _copy_tile(values: Tensor, shard: Shard, tile: tuple[int, ...], generator: torch.Generator) -> None:
    """Generate one tile of the full tensor, and copy the elements that belong to `shard` into `values`."""
    assert isinstance(shard.initial, Normal)
    extent = []
    for dim, number in enumerate(tile):
        step = _tile_size(len(tile), dim)
        extent.append(slice(number * step, min((number + 1) * step, shard.shape[dim])))
    drawn = torch.empty([part.stop - part.start for part in extent])
    drawn.normal_(0.0, shard.initial.std, generator=generator)
    shared = overlap(shard.range, tuple(extent))
    assert shared is not None  # the caller passes only tiles that overlap the shard
    into, out_of = shared
    values[into] = drawn[out_of]


def _generator(seed: int, name: str, tile: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name} {tile}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
