"""The layout of flat tensors that a file does not describe: which tensors they hold, in which order.

In metaseq's files without `shard_metadata`, the order is that in which the modules were built. Either each layer has a
flat tensor and one more holds the rest, or one flat tensor holds everything, with the last LayerNorm at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opt_parallel.config.model import MOST_LAYERS, POSITION_OFFSET
from opt_parallel.metaseq.parts import Layout
from opt_parallel.metaseq.settings import HEADS, POSITIONS, SMALL, VOCABULARY, Settings
from opt_parallel.runtime.errors import UserError

ROOT = "flat_param_0"
Tensors = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class _Size:
    """The numbers that determine a part's layout. `vocabulary` is None if only the lengths tell it."""

    layers: int
    hidden: int
    ffn: int
    positions: int
    vocabulary: int | None


def layout_of(folder: Path, lengths: dict[str, int], shards: int, parts: int, settings: Settings) -> Layout:
    """The layout of the flat tensors of one of `parts` model parts, whose shards have `lengths` elements together.

    Raises: UserError if the lengths fit neither the settings nor a published size."""
    for size in _sizes(len(lengths) - 1, settings):
        layout = _fitting(size, lengths, shards, parts)
        if layout is not None:
            return layout
    told = ", ".join(f"{name}={value}" for name, value in settings.numbers.items()) or "no size"
    raise UserError(
        f"{folder}: the lengths of its flat tensors ({ROOT} has {lengths.get(ROOT, 0):,} elements in each of {parts} "
        f"parts) do not fit its settings ({told}) or a published size of OPT: use a complete copy"
    )


def _sizes(apart: int, settings: Settings) -> Iterator[_Size]:
    """The sizes that a checkpoint may have: the one in its settings, or else the published ones.

    `apart` is the number of layers that have a flat tensor each, or 0."""
    names = ("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim")
    positions = settings.positions or POSITIONS
    if all(name in settings.numbers for name in names):
        layers, hidden, ffn = (settings.numbers[name] for name in names)
        yield _Size(layers, hidden, ffn, positions, None if settings.positions else VOCABULARY)
        return
    for layers, hidden in HEADS:
        if (layers, hidden) != SMALL and apart in (0, layers):
            yield _Size(layers, hidden, 4 * hidden, positions, VOCABULARY)


def _fitting(size: _Size, lengths: dict[str, int], shards: int, parts: int) -> Layout | None:
    """The layout of a part of a network of this size, or None if the lengths do not fit it."""
    hidden = size.hidden
    if size.layers > MOST_LAYERS or hidden % parts or size.ffn % parts or (size.vocabulary or 0) % parts:
        return None
    layers = [_layer(f"decoder.layers.{number}", hidden, size.ffn, parts) for number in range(size.layers)]
    positions = ("decoder.embed_positions.weight", (size.positions + POSITION_OFFSET, hidden))
    last = tuple((f"decoder.layer_norm.{kind}", (hidden,)) for kind in ("weight", "bias"))
    of_layers = {f"decoder.layers.{number}.{ROOT}": layer for number, layer in enumerate(layers)}
    if lengths.keys() == {ROOT, *of_layers}:
        inside: Tensors = ()
    elif lengths.keys() == {ROOT}:
        inside, of_layers = tuple(tensor for layer in layers for tensor in layer), {}
    else:
        return None
    rest = lengths[ROOT] - _numel((positions, *inside, *last))
    rows = size.vocabulary // parts if size.vocabulary else rest // hidden
    tokens = ("decoder.embed_tokens.weight", (rows, hidden))
    layout = {ROOT: (tokens, positions, *inside, *last), **of_layers}
    fits = all(0 <= lengths[name] - _numel(tensors) < shards for name, tensors in layout.items())
    return layout if rows > 0 and fits else None


def _layer(name: str, hidden: int, ffn: int, parts: int) -> Tensors:
    """The tensors of a layer in one model part, in the order in which metaseq builds its modules."""
    tensors = {
        "self_attn.qkv_proj.weight": (3 * hidden // parts, hidden), "self_attn.qkv_proj.bias": (3 * hidden // parts,),
        "self_attn.out_proj.weight": (hidden, hidden // parts), "self_attn.out_proj.bias": (hidden,),
        "self_attn_layer_norm.weight": (hidden,), "self_attn_layer_norm.bias": (hidden,),
        "fc1.weight": (ffn // parts, hidden), "fc1.bias": (ffn // parts,),
        "fc2.weight": (hidden, ffn // parts), "fc2.bias": (hidden,),
        "final_layer_norm.weight": (hidden,), "final_layer_norm.bias": (hidden,),
    }  # fmt: skip
    return tuple((f"{name}.{tensor}", shape) for tensor, shape in tensors.items())


def _numel(tensors: Tensors) -> int:
    return sum(math.prod(shape) for _, shape in tensors)
