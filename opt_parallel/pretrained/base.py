"""What the three classes share: building, loading, saving, embeddings, and what a torch module promises."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from opt_parallel.checkpoint.manifest import MANIFEST
from opt_parallel.checkpoint.sources import Opened, open_folder
from opt_parallel.config.model import MAY_DIFFER, ModelConfig
from opt_parallel.config.units import bytes_of
from opt_parallel.huggingface.folder import model_file, write_folder
from opt_parallel.huggingface.hub import WEIGHTS, Download, find_checkpoint, upload
from opt_parallel.huggingface.names import to_hf
from opt_parallel.model.opt import Block
from opt_parallel.parallel.shard import Source, fill, gather_parameter, marked, random_source
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.parallel.vocab import VocabParallelEmbedding
from opt_parallel.pretrained.arguments import place_of, without_effect
from opt_parallel.pretrained.config import HUB, OPTConfig, dtype_of
from opt_parallel.pretrained.module import OPTModule
from opt_parallel.pretrained.resizing import embedding_of, resized, without_padding
from opt_parallel.runtime.errors import UserError, WrongArgument, refusing

PREFIX = "model."  # of the decoder's parameters in a model with a head


class PretrainedOPT(OPTModule):
    """Base of the three classes.

    Dropout and LayerDrop act in training mode. They depend on `seed` and the number of samples and forwards so far, and
    are the same on all ranks. Keys of `state_dict` are transformers'; with a tensor group the values are this rank's
    parts.
    """

    def __init__(
        self,
        config: OPTConfig,
        *,
        tensor: Group = ALONE,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A model with random weights: N(0, init_std²) for matrices, zero for biases and the padding token, one for
        LayerNorms. They are a pure function of `seed`, the same at any tensor degree.

        Args:
            config: ours or transformers'.
            tensor: the tensor group, whose ranks all build the model; `topology.tensor`.
            device, dtype: None: torch's defaults. On the device "meta" nothing is allocated.

        Raises: WrongArgument."""
        super().__init__()
        self.config, self.group, self.seed = _ours(config), tensor, seed
        network = self.config.network()
        with refusing(type(self).__name__):
            network.check_splits(tensor.size, "the tensor degree ")
        with torch.device("meta"):
            self._build(network)
        if self.config.pad_token_id is None:
            without_padding(self.get_input_embeddings())
        place = torch.get_default_device() if device is None else torch.device(device)
        if place.type != "meta":
            fill(self, _without_prefix(random_source(seed)), place, dtype or torch.get_default_dtype())
        if callable(self.config.activation_function):
            for block in self.base_model.decoder.layers:
                assert isinstance(block, Block)
                block.activation = self.config.activation_function

    def _build(self, network: ModelConfig) -> None:
        """Create the modules, on the meta device."""
        raise NotImplementedError

    @property
    def name_or_path(self) -> str:
        """The name that the checkpoint was loaded by."""
        return self.config.name_or_path

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        config: OPTConfig | str | Path | None = None,
        tensor: Group = ALONE,
        device: torch.device | str = "cpu",
        device_map: torch.device | str | Mapping[str, Any] | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        from_tf: bool = False,
        from_flax: bool = False,
        ignore_mismatched_sizes: bool = False,
        seed: int = 0,
        **arguments: Any,
    ) -> Self:
        """The model of a checkpoint: a Hugging Face folder or hub id, or a training checkpoint; in evaluation mode.

        Args:
            config: in place of the checkpoint's, also by the name of its folder; its network must be the
                checkpoint's.
            tensor: the tensor group; each rank reads its part only.
            device_map: the device by transformers' name, also {"": device}; "auto": this process's GPU, or the CPU.
            dtype: of the weights; None or "auto": the checkpoint's. `torch_dtype` is its older name.
            use_safetensors, from_tf, from_flax: read safetensors (False: pytorch_model.bin), tf_model.h5 or
                flax_model.msgpack; else the first format that is there.
            ignore_mismatched_sizes: whether a classifier's head for another number of labels is replaced by a new one.
            seed: of a new head, and of dropout.
            arguments: revision, cache_dir, token, local_files_only choose the files; any other replaces a value of the
                configuration, such as num_labels, problem_type or output_attentions.

        Raises: UserError if it cannot be read, is not an OPT or not this network; WrongArgument."""
        formats = _formats(use_safetensors, from_tf, from_flax)
        chosen = {key: arguments.pop(key) for key in HUB if key in arguments}
        download = Download(**chosen, weights=formats[0] if len(formats) == 1 else None)
        arguments = without_effect(f"{cls.__name__}.from_pretrained", arguments)
        _check_known(cls.__name__, arguments)
        folder = find_checkpoint(name, "", download)
        if config is None:
            config = OPTConfig.read(folder, str(name), arguments)
        else:
            config = OPTConfig.from_pretrained(config) if isinstance(config, str | Path) else config
            config = OPTConfig.from_dict(_ours(config).to_dict(), **arguments)
        model = cls(config, tensor=tensor, seed=seed, device="meta")
        opened = open_folder(folder, config.network(), formats=formats)
        source = model._source(opened, ignore_mismatched_sizes)
        asked = torch_dtype if dtype is None else dtype
        config.dtype = (config.dtype or opened.dtype) if asked in (None, "auto") else dtype_of(asked)
        assert config.dtype is not None
        opened.fill(model, _without_prefix(source), tensor, place_of(device, device_map), config.dtype)
        model._read_files(folder)
        return model.eval()

    def _source(self, opened: Opened, new_head: bool) -> Source:
        """The source of this model's parameters in a checkpoint. Raises: UserError unless it holds them."""
        raise NotImplementedError

    def _read_files(self, folder: Path) -> None:
        """Read what the checkpoint has besides configuration and weights."""

    def save_pretrained(
        self,
        folder: str | Path,
        max_shard_size: str | int = "5GB",
        safe_serialization: bool = True,
        is_main_process: bool = True,
        **arguments: Any,
    ) -> None:
        """Write a folder for `from_pretrained`, here and in transformers, in the weights' dtype: complete or not at
        all. A folder that exists and holds no model gets the files, config.json last.

        is_main_process: False: nothing is written; without effect in a tensor group, which needs all its ranks.
        arguments: those of transformers that have no effect.

        Every rank of the tensor group must call this; the first rank writes, one tensor at a time. If several tensor
        groups hold the same model, only one group may call it. Raises: UserError; WrongArgument if `config` no longer
        describes the model."""
        if not safe_serialization:
            raise WrongArgument("safe_serialization=False: weights are written as safetensors only; leave it out")
        if unknown := list(without_effect("save_pretrained", arguments)):
            raise WrongArgument(f"save_pretrained has no argument {unknown[0]}: check its spelling")
        exists = Path(folder).exists()
        if exists and not Path(folder).is_dir():
            raise UserError(f"{folder} is a file: choose another folder")
        if exists and (present := model_file(Path(folder), MANIFEST)):
            raise UserError(f"{folder} exists and has the {present} of a model: remove it or choose another folder")
        if not is_main_process and self.group.size == 1:
            return
        content = self._content()
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor, _ in marked(self)}
        write_folder(
            Path(folder),
            content,
            [(name.removeprefix(PREFIX), shard) for name, _, shard in marked(self)],
            lambda name, shard: gather_parameter(tensors[name], shard, self.group),
            self.dtype,
            bytes_of(max_shard_size, "max_shard_size="),
            files=self._files(),
            add=exists,
            to_theirs=self._to_theirs,
            group=self.group,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload model",
        max_shard_size: str | int = "5GB",
    ) -> str:
        """Save the model to the repository `repo_id` of the hub, which is created if it does not exist; returns its
        address. Every rank of the tensor group calls this. The token is neither printed nor written.

        Raises: UserError."""
        return upload(
            lambda folder: self.save_pretrained(folder, max_shard_size),
            repo_id, private, token, commit_message, self.group.rank == 0,
        )  # fmt: skip

    def _content(self) -> dict[str, Any]:
        """The content of config.json. Raises: WrongArgument if the configuration does not describe this network."""
        config = copy.deepcopy(self.config)
        config.dtype, config.architectures = self.dtype, [type(self).__name__]
        here, there = self.get_decoder().config, config.network()
        for name in {field.name for field in fields(ModelConfig)} - MAY_DIFFER:
            if getattr(here, name) != getattr(there, name):
                raise WrongArgument(
                    f"config.{name}={getattr(there, name)!r} is not the model's {getattr(here, name)!r}: restore it, "
                    "or build a model of this configuration"
                )
        return config.content()

    def _files(self) -> dict[str, bytes]:
        """Other files of the folder."""
        return {}

    def _to_theirs(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return to_hf(name, values)

    def get_input_embeddings(self) -> VocabParallelEmbedding:
        """The token embedding; its weight holds this rank's rows."""
        return self.get_decoder().embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding by another one of the same width: torch's `nn.Embedding` of all rows, the same on
        all ranks, whose values are copied, or one of this class. `config.vocab_size` and a tied head follow.

        Raises: WrongArgument."""
        self._set_embedding(embedding_of(value, self.get_decoder(), self.group))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> VocabParallelEmbedding:
        """Give the embedding `new_num_tokens` rows (None: as many as now), rounded up to a multiple of
        `pad_to_multiple_of`. Old rows are kept, each new row is the mean of the old ones; fewer rows drop the last. A
        tied head and `config.vocab_size` follow. Returns the embedding, with a new parameter.

        Every rank of the tensor group calls this. Raises: WrongArgument."""
        with refusing("resize_token_embeddings"):
            new = resized(self.get_decoder(), new_num_tokens, pad_to_multiple_of, mean_resizing, self.group)
        if new is not self.get_input_embeddings():
            self._set_embedding(new)
        return new

    def _set_embedding(self, embedding: VocabParallelEmbedding) -> None:
        decoder = self.get_decoder()
        decoder.embed_tokens = embedding
        decoder.config = replace(decoder.config, vocab_size=embedding.vocab_size)
        self.config.vocab_size = embedding.vocab_size
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection, tied to the embedding; None without one."""
        return None

    def prune_heads(self, heads: Mapping[int, list[int]]) -> None:
        """Refused. Raises: WrongArgument."""
        raise WrongArgument(
            f"prune_heads({dict(heads)!s:.200}): heads are not removed; to silence them, pass head_mask with 0 at "
            "[layer, head] to the forward"
        )


def _ours(config: Any) -> OPTConfig:
    """`config`, or transformers' as ours. Raises: WrongArgument."""
    if isinstance(config, OPTConfig):
        return config
    if getattr(config, "model_type", None) == "opt":
        return OPTConfig.from_dict(config.to_dict())
    raise WrongArgument(
        f"config is a {type(config).__name__}: give an OPTConfig; to load a checkpoint by its name, use from_pretrained"
    )


def _formats(use_safetensors: bool | None, from_tf: bool, from_flax: bool) -> tuple[str, ...]:
    """The formats of weights to look for. Raises: WrongArgument."""
    chosen = (use_safetensors is True, use_safetensors is False, from_tf, from_flax)
    found = tuple(name for name, each in zip(WEIGHTS, chosen, strict=True) if each)
    if len(found) > 1:
        raise WrongArgument(f"from_pretrained: the arguments ask for {' and '.join(found)}: choose one format")
    return found or WEIGHTS


def _check_known(where: str, arguments: Mapping[str, Any]) -> None:
    known = {*vars(OPTConfig()), "num_labels", "label2id"}
    for name in arguments:
        if name not in known:
            raise WrongArgument(
                f"{where}.from_pretrained has no argument {name}, nor has OPTConfig: check its spelling"
            )


def _without_prefix(source: Source) -> Source:
    """`source`, whose names lack `PREFIX`, for a model with or without a head."""
    return lambda name, shard: source(name.removeprefix(PREFIX), shard)
