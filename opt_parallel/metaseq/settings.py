"""The settings that a metaseq file stores beside its weights, and the network that settings and shapes describe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_parallel.config.model import POSITION_OFFSET, ModelConfig
from opt_parallel.huggingface.config import CONFIG, network_of, read_values
from opt_parallel.metaseq.pickled import item, mapping
from opt_parallel.runtime.errors import UserError

# The published sizes: number of layers and width, and the number of attention heads (Zhang et al. 2022, table 1).
HEADS = {
    (12, 768): 12, (24, 1024): 16, (24, 2048): 32, (32, 2560): 32, (32, 4096): 32, (40, 5120): 40, (48, 7168): 56,
    (64, 9216): 72, (96, 12288): 96,
}  # fmt: skip
MOST = 1 << 31
RATES = ("dropout", "attention_dropout")
SMALL = (24, 1024)  # OPT-350m, the one size with LayerNorms after the residual sums
VOCABULARY, POSITIONS = 50272, 2048  # of all published sizes
NUMBERS = {
    "decoder_layers": "num_hidden_layers", "decoder_embed_dim": "hidden_size", "decoder_ffn_embed_dim": "ffn_dim",
    "decoder_attention_heads": "num_attention_heads",
}  # fmt: skip

LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.")

Shapes = dict[str, tuple[int, ...]]  # the shapes of full tensors by metaseq's names


@dataclass(frozen=True)
class Settings:
    """What a file says of its network, by metaseq's names. None: the file does not say it."""

    numbers: dict[str, int]
    positions: int | None
    norm_first: bool | None
    activation: str | None
    scaled: bool | None
    rates: dict[str, float]
    updates: int | None

    def identity(self) -> dict[str, Any]:
        """The values that the files of one checkpoint have in common."""
        return {**{name: self.numbers.get(name) for name in NUMBERS}, "num_updates": self.updates}


def settings_of(content: object) -> Settings:
    """The settings in the object of a file: `cfg` of metaseq, or `args` of fairseq."""
    model = item(content, "cfg", "model")
    if not mapping(model):
        model = item(content, "args")
    values = {key: item(model, key) for key in mapping(model) if type(key) is str}
    numbers = {name: size for name in NUMBERS if (size := _size(values.get(name)))}
    positions = [
        values.get("max_target_positions"), values.get("tokens_per_sample"),
        item(content, "cfg", "task", "tokens_per_sample"),
    ]  # fmt: skip
    rates = {name: float(value) for name in RATES if isinstance(value := values.get(name), int | float)}
    before, activation, unscaled = (
        values.get(name) for name in ("decoder_normalize_before", "activation_fn", "no_scale_embedding")
    )
    history = item(content, "optimizer_history")
    updates = item(history[-1], "num_updates") if isinstance(history, list) and history else None
    return Settings(
        numbers,
        next((size for value in positions if (size := _size(value))), None),
        before if type(before) is bool else None,
        activation if type(activation) is str else None,
        not unscaled if type(unscaled) is bool else None,
        rates,
        _size(updates),
    )


def _size(value: object) -> int | None:
    """A stored number, or None for any other value."""
    return value if isinstance(value, int) and type(value) is int and 0 < value < MOST else None


def network(folder: Path, settings: Settings, shapes: Shapes) -> ModelConfig:
    """The network of a checkpoint from the shapes of its full tensors, its settings, and a config.json beside it.

    Raises: UserError if they contradict each other, or if a value is neither stored nor that of a published size."""
    values = _from_shapes(folder, shapes)
    for name, ours in NUMBERS.items():
        said = settings.numbers.get(name)
        if said is not None and values.setdefault(ours, said) != said:
            raise UserError(
                f"{folder}: its settings say {name}={said}, but its tensors have {values[ours]}: use a complete copy "
                "of one checkpoint"
            )
    if settings.scaled:
        raise UserError(f"{folder}: its settings say no_scale_embedding=False, and OPT's embeddings are not scaled")
    values |= settings.rates
    if settings.activation is not None:
        values["activation_function"] = settings.activation
    size = (values["num_hidden_layers"], values["hidden_size"])
    given = read_values(folder) if (folder / CONFIG).is_file() else {}
    norm_first = given.get("do_layer_norm_before") if settings.norm_first is None else settings.norm_first
    _set_norms(values, norm_first, size, "decoder.layer_norm.weight" in shapes)
    for name, value in given.items():
        if name in values and name not in RATES and value != values[name]:
            raise UserError(
                f"{folder / CONFIG} says {name}={value!r:.80}, but the checkpoint has {values[name]!r}: change the file"
            )
    values |= given
    if size in HEADS:
        values.setdefault("num_attention_heads", HEADS[size])
    for name in ("num_attention_heads", "do_layer_norm_before"):
        if name not in values:
            raise UserError(_asked(folder, name, size))
    return network_of(values, f"{folder}: ")


def _from_shapes(folder: Path, shapes: Shapes) -> dict[str, Any]:
    """The values of a config.json that the shapes of the tensors tell."""
    layers = 1 + max((int(match[1]) for name in shapes if (match := LAYER.match(name))), default=-1)
    names = ("embed_tokens.weight", "embed_positions.weight", "layers.0.fc1.weight")
    for name in (*names, *(f"layers.{number}.fc1.weight" for number in range(layers))):
        if len(shapes.get(f"decoder.{name}", ())) != 2:
            raise UserError(f"{folder}: decoder.{name} is missing or no matrix: use a complete copy")
    (vocabulary, width), (rows, hidden), (ffn, _) = (shapes[f"decoder.{name}"] for name in names)
    return {
        "vocab_size": vocabulary, "word_embed_proj_dim": width, "max_position_embeddings": rows - POSITION_OFFSET,
        "hidden_size": hidden, "ffn_dim": ffn, "num_hidden_layers": layers,
        "enable_bias": "decoder.layers.0.fc1.bias" in shapes,
        "layer_norm_elementwise_affine": "decoder.layers.0.final_layer_norm.weight" in shapes,
    }  # fmt: skip


def _set_norms(values: dict[str, Any], norm_first: bool | None, size: tuple[int, int], last: bool) -> None:
    """Set where the LayerNorms are. `last` is whether there is one after the last layer.

    Only networks with LayerNorm first have it, and early conversions lost it. `norm_first` is what the settings say.
    `decoder.version` says nothing about this."""
    if last or size == SMALL:
        norm_first = last
    elif norm_first is None and size in HEADS:
        norm_first = True
    if norm_first is not None:
        values["do_layer_norm_before"] = norm_first
        values["_remove_final_layer_norm"] = norm_first and not last


def _asked(folder: Path, name: str, size: tuple[int, int]) -> str:
    example = "16" if name == "num_attention_heads" else "false"
    return (
        f"{folder} does not say {name}, and {size[0]} layers of width {size[1]} are no published size of OPT: create "
        f'{folder / CONFIG} with {{"model_type": "opt", "{name}": {example}}} and the right value'
    )
