"""OPTConfig as Hugging Face documents it. `huggingface.config` converts between it and the network's configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from opt_parallel.checkpoint.inherit import labels_at, model_at
from opt_parallel.checkpoint.manifest import MANIFEST
from opt_parallel.config.model import Init, Labels, ModelConfig
from opt_parallel.huggingface.config import (
    CONFIG,
    as_json,
    config_for_hf,
    labels_for_hf,
    labels_of,
    network_of,
    read_values,
)
from opt_parallel.huggingface.hub import Download, find_checkpoint
from opt_parallel.pretrained.arguments import without_effect
from opt_parallel.runtime.errors import UserError, WrongArgument, one_line, refusing
from opt_parallel.storage.atomic import write_bytes
from opt_parallel.storage.foreign import read_json

# what other configurations use; the class of transformers has these too
ELSEWHERE = {
    "architectures": None,
    "transformers_version": None,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
}
# the class has the first; attention is fused wherever its weights are not returned, whatever the second says
DROPPED = ("model_type", "attn_implementation")
# not shown where they have their default
QUIET = (
    *ELSEWHERE, "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict",
    "dtype", "_name_or_path",
)  # fmt: skip
HUB = ("revision", "cache_dir", "token", "local_files_only")  # arguments of `from_pretrained` that choose the files


class OPTConfig:
    """The configuration of an OPT model; defaults give the shape of OPT-125m, with attention_dropout=0.

    Arguments that it does not know become attributes, and are written to config.json again. An attribute may be changed
    at any time. A built model reads at each call: use_cache, output_attentions, output_hidden_states, return_dict,
    problem_type, id2label and pad_token_id (where a sequence ends). The sizes cannot be
    changed after the model has been built.

    Raises: WrongArgument, a ValueError, for a network that OPT cannot be.
    """

    architectures: list[str] | None
    model_type = "opt"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]  # transformers' Trainer reads it

    def __init__(
        self,
        vocab_size: int = 50272,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        ffn_dim: int = 3072,
        max_position_embeddings: int = 2048,
        do_layer_norm_before: bool = True,
        _remove_final_layer_norm: bool = False,
        word_embed_proj_dim: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        num_attention_heads: int = 12,
        activation_function: str | Callable[[torch.Tensor], torch.Tensor] = "relu",
        layerdrop: float = 0.0,
        init_std: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int = 2,
        eos_token_id: int = 2,
        enable_bias: bool = True,
        layer_norm_elementwise_affine: bool = True,
        *,
        id2label: Mapping[int, str] | Mapping[str, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        num_labels: int | None = None,
        problem_type: str | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.ffn_dim, self.max_position_embeddings = ffn_dim, max_position_embeddings
        self.do_layer_norm_before, self._remove_final_layer_norm = do_layer_norm_before, _remove_final_layer_norm
        self.word_embed_proj_dim = hidden_size if word_embed_proj_dim is None else word_embed_proj_dim
        self.dropout, self.attention_dropout, self.layerdrop = dropout, attention_dropout, layerdrop
        self.num_attention_heads, self.activation_function = num_attention_heads, activation_function
        self.init_std, self.use_cache, self.tie_word_embeddings = init_std, use_cache, tie_word_embeddings
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.enable_bias, self.layer_norm_elementwise_affine = enable_bias, layer_norm_elementwise_affine
        self.output_attentions, self.output_hidden_states = output_attentions, output_hidden_states
        self.return_dict, self.problem_type = return_dict, problem_type
        self.dtype: torch.dtype | None = dtype_of(torch_dtype if dtype is None else dtype)
        self.id2label: dict[int, str] = _labels(id2label, label2id, num_labels)
        self._name_or_path = str(others.pop("name_or_path", ""))
        for name, value in {**ELSEWHERE, **others}.items():
            if name not in DROPPED:
                setattr(self, name, value)
        self.network()
        self.labels()

    @property
    def num_labels(self) -> int:
        """The number of labels; setting another number names them LABEL_0, LABEL_1, …"""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if number != len(self.id2label):
            self.id2label = dict(enumerate(Labels.numbered(number).names))

    @property
    def label2id(self) -> dict[str, int]:
        """The labels' numbers by name: always the inverse of `id2label`, which setting it changes."""
        return {name: number for number, name in self.id2label.items()}

    @label2id.setter
    def label2id(self, numbers: Mapping[str, int]) -> None:
        self.id2label = {number: name for name, number in numbers.items()}

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` by its older name."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: torch.dtype | str | None) -> None:
        self.dtype = dtype_of(dtype)

    @property
    def use_return_dict(self) -> bool:
        """`return_dict` by its older name."""
        return self.return_dict

    @property
    def name_or_path(self) -> str:
        """The name that the checkpoint was loaded by."""
        return self._name_or_path

    def network(self) -> ModelConfig:
        """The network that this configuration describes. Raises: WrongArgument."""
        values = dict(vars(self))
        if callable(self.activation_function):
            values["activation_function"] = "relu"  # replaced in each layer after building
        if self.pad_token_id is None:
            values["pad_token_id"] = 0  # after building, no token is padding
        with refusing("OPTConfig"):
            return replace(network_of(values, ""), init=Init.huggingface)

    def labels(self) -> Labels:
        """The labels that this configuration names. Raises: WrongArgument."""
        with refusing("OPTConfig"):
            labels = labels_of(vars(self), "")
        if self.problem_type == "single_label_classification" and len(labels.names) == 1:
            raise WrongArgument(
                "OPTConfig: problem_type='single_label_classification' with num_labels=1: set num_labels=2 or more, or "
                "problem_type='regression'"
            )
        return labels

    @classmethod
    def of(cls, network: ModelConfig, dtype: torch.dtype | None = None, labels: Labels | None = None) -> Self:
        """The configuration of a network."""
        values = config_for_hf(network, dtype) | (labels_for_hf(labels) if labels else {})
        return cls(**{**values, "torch_dtype": dtype, "architectures": None})

    @classmethod
    def from_pretrained(cls, name: str | Path, **arguments: Any) -> Self:
        """The configuration of a Hugging Face folder, a hub id or a training checkpoint; `arguments` replace its
        values, except `revision`, `cache_dir`, `token` and `local_files_only`, which choose the files.

        Raises: UserError if it cannot be read or is not an OPT; WrongArgument."""
        download = Download(**{key: arguments.pop(key) for key in HUB if key in arguments})
        arguments = without_effect("OPTConfig.from_pretrained", arguments)
        return cls.read(find_checkpoint(name, "", download), str(name), arguments)

    @classmethod
    def read(cls, folder: Path, name: str, arguments: Mapping[str, Any]) -> Self:
        """The configuration in the checkpoint `folder`, which the user calls `name`, with `arguments` in place of its
        values. Raises: UserError."""
        if (folder / MANIFEST).is_file():
            labels = labels_at(folder)
            found = cls.of(model_at(folder, ""), torch.float32, labels).to_dict()
        else:
            found = read_values(folder)
        found.pop("torch_dtype" if found.get("dtype") else "", None)
        try:
            return cls.from_dict({**found, "_name_or_path": name}, **arguments)
        except UserError as error:
            raise WrongArgument(f"{folder / CONFIG}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **arguments: Any) -> Self:
        """The configuration with these `values`, as `to_dict` gives them; `arguments` replace some of them."""
        if arguments.get("num_labels") is None:
            arguments.pop("num_labels", None)
        elif "id2label" not in arguments:
            names = values.get("id2label") or values.get("label2id") or range(2)
            if len(names) != arguments["num_labels"]:
                values = {key: value for key, value in values.items() if key not in ("id2label", "label2id")}
        if "id2label" in arguments or "label2id" in arguments:
            values = {key: each for key, each in values.items() if key not in ("id2label", "label2id", "num_labels")}
        return cls(**{**values, **arguments})

    def to_dict(self) -> dict[str, Any]:
        """All attributes, also those that it does not know, as config.json holds them."""
        values = copy.deepcopy(vars(self))
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {**values, "label2id": self.label2id, "dtype": dtype, "model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without the attributes of all configurations that have their default."""
        defaults = OPTConfig().to_dict()
        return {key: each for key, each in self.to_dict().items() if key not in QUIET or each != defaults[key]}

    def content(self) -> dict[str, Any]:
        """The content of config.json. Raises: WrongArgument if a function is the activation."""
        if callable(self.activation_function):
            raise WrongArgument(
                f"activation_function={self.activation_function!r:.200} is a function, which config.json cannot hold: "
                "name one of relu, gelu, silu, gelu_new"
            )
        values = {**self.to_diff_dict(), "model_type": self.model_type}
        values.pop("_name_or_path", None)
        dtype = values.pop("dtype", None)  # written by its older name, which every version of transformers reads
        return values if dtype is None else {**values, "torch_dtype": dtype}

    def to_json_string(self, use_diff: bool = True) -> str:
        """config.json as text; with `use_diff=False` also the defaults that it leaves out. Raises: WrongArgument, as
        `content`."""
        content = self.content()
        return as_json(content if use_diff else {**self.to_dict(), **content}).decode()

    def to_json_file(self, path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string` to a file. Raises: WrongArgument, as `content`."""
        write_bytes(Path(path), self.to_json_string(use_diff).encode())

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """The configuration in a file, as `to_json_file` writes it. Raises: UserError; WrongArgument."""
        try:
            return cls.from_dict(read_json(Path(path)))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): give the path of a config.json") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json into `folder`, which may exist. Raises: WrongArgument if it cannot be read again."""
        self.network()
        self.labels()
        content = as_json(self.content())
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_bytes(Path(folder) / CONFIG, content)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set attributes."""
        for name, value in values.items():
            setattr(self, name, value)

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __eq__(self, other: object) -> bool:
        """Whether all attributes are equal, besides the name and version under which a file was read."""
        if not isinstance(other, OPTConfig):
            return False
        apart = {"_name_or_path": "", "transformers_version": None}
        return {**self.to_dict(), **apart} == {**other.to_dict(), **apart}

    def __repr__(self) -> str:
        values = {**self.to_diff_dict(), "activation_function": str(self.activation_function)}
        return f"OPTConfig {as_json(values).decode()}".rstrip()


def _labels(
    id2label: Mapping[int, str] | Mapping[str, str] | None, label2id: Mapping[str, int] | None, num_labels: int | None
) -> dict[int, str]:
    """The labels' names by number; two labels if none of the three is given. Raises: WrongArgument."""
    if id2label is None and label2id is not None:
        id2label = {number: name for name, number in label2id.items()}
    if id2label is not None and num_labels not in (None, len(id2label)):
        raise WrongArgument(f"OPTConfig: num_labels={num_labels}, but id2label names {len(id2label)} labels: give one")
    with refusing("OPTConfig"):
        labels = labels_of({"num_labels": 2 if num_labels is None else num_labels, "id2label": id2label}, "")
    return dict(enumerate(labels.names))


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch's dtype of that name. Raises: WrongArgument."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        found = None
    if dtype is not None and found is None:
        raise WrongArgument(f"dtype={dtype!r:.80} is not a dtype of weights: choose float32, bfloat16 or float16")
    return found
