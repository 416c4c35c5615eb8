"""Completes the configuration of a run from the checkpoint of `init_from` and from its tokenizer.

This module does not import torch, so that errors are reported quickly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opt_parallel.checkpoint.manifest import MANIFEST, Damaged, read_manifest
from opt_parallel.config.compose import take, verbatim
from opt_parallel.config.model import MAY_DIFFER, Labels, ModelConfig, ProblemType
from opt_parallel.config.task import Task, name_of
from opt_parallel.huggingface.config import ADAPTER_CONFIG, CONFIG, is_classifier, read_config, read_labels
from opt_parallel.huggingface.hub import find_checkpoint
from opt_parallel.huggingface.tokenizer import check_size, read_tokenizer
from opt_parallel.metaseq.files import is_metaseq
from opt_parallel.metaseq.folder import describe
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.log import say
from opt_parallel.storage.foreign import file_in

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_at(folder: Path, key: str) -> ModelConfig:
    """The configuration of the network in `folder`, which may be a training checkpoint (`checkpoints/step-<N>`), a
    Hugging Face folder, or a folder with a metaseq checkpoint.

    Raises: UserError if `folder` is none of them. The error message starts with `key` (such as `init_from=`)."""
    if (folder / MANIFEST).is_file():
        return _model_of(folder, read_manifest(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{key}{folder} is a PEFT adapter, not a network: name the LoRA run's own checkpoint, or merge the "
            "adapter into its base first (peft's merge_and_unload)"
        )
    if folder.is_file():
        raise UserError(f"{key}{folder} is a file: name the folder that contains the checkpoint")
    if is_metaseq(folder):
        return describe(folder).config
    if file_in(folder, CONFIG):
        return read_config(folder)
    raise UserError(
        f"{key}{folder} is neither a training checkpoint (…/checkpoints/step-<N>, with {MANIFEST}) nor a Hugging Face "
        f"folder (with {CONFIG}) nor a metaseq checkpoint (with .pt files)"
    )


def _model_of(folder: Path, manifest: dict[str, Any]) -> ModelConfig:
    try:
        saved = verbatim(manifest["config"]["model"])
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), saved))
    except (OmegaConfBaseException, UserError) as error:
        raise Damaged(folder, f"{MANIFEST} does not describe a network ({one_line(error)})") from error
    assert isinstance(model, ModelConfig)
    tensors = manifest["tensors"].values()  # contains at least one tensor of each layer, also with LoRA
    held = sum(math.prod(tensor["shape"]) for tensor in tensors)
    if model.num_hidden_layers > len(tensors) or (not manifest.get("base") and model.parameters() > held):
        raise Damaged(folder, f"{MANIFEST} describes a network that is larger than the tensors")
    return model


def labels_at(folder: Path) -> Labels | None:
    """The labels of the classifier in a checkpoint's folder, or None for a language model. Raises: `UserError`."""
    if (folder / MANIFEST).is_file():
        saved = read_manifest(folder).get("labels")
        problem = saved and saved["problem_type"]
        return saved and Labels(tuple(saved["names"]), problem and ProblemType(problem))
    return read_labels(folder) if _is_classifier(folder) else None


def _is_classifier(folder: Path) -> bool:
    """Whether a folder that is no training checkpoint holds a classifier. metaseq has none."""
    return not is_metaseq(folder) and is_classifier(folder)


def _take_labels(config: DictConfig, labels: Labels) -> None:
    """Take the classifier's labels if the run names no labels. Raise UserError if the run names other labels."""
    task = config.task
    if task.problem_type is None and labels.problem_type is not None:
        take(config, "task.problem_type", labels.problem_type)
    if labels == Labels.numbered(len(labels.names), labels.problem_type):
        return  # the classifier's labels have no names, so the run takes the names in the data
    if task.labels is None:
        take(config, "task.labels", labels.names)
    elif tuple(map(name_of, task.labels)) != labels.names:
        raise UserError(
            f"task.labels={list(task.labels)}, but the classifier of init_from={config.init_from} has "
            f"{list(labels.names)}: remove task.labels, or start from a language model"
        )


def start_from_checkpoint(config: DictConfig, overrides: Sequence[str]) -> None:
    """If `init_from` names a checkpoint, take the network, the tokenizer and the run's name from this checkpoint.

    Settings on the command line (`overrides`) are kept. Shapes of the network must equal the checkpoint's, except that
    a larger `model.vocab_size` adds rows to the embedding. Ids of special tokens may differ. Raises: `UserError`."""
    if config.init_from is None:
        return
    folder = find_checkpoint(config.init_from, "init_from=")
    model = OmegaConf.structured(model_at(folder, "init_from="))
    given = {each.lstrip("+").partition("=")[0] for each in overrides}
    all_given = bool({"model", "experiment"} & given)
    for name in model:
        if name in MAY_DIFFER:
            if not all_given and f"model.{name}" not in given:
                take(config, f"model.{name}", model[name])
        elif name in SPECIAL_IDS and f"model.{name}" in given:
            continue
        elif name == "vocab_size" and f"model.{name}" in given:
            _require_may_grow(config, model[name])
        elif all_given or f"model.{name}" in given:
            _require_same(config, str(name), model[name])
        else:
            take(config, f"model.{name}", model[name])
    labels = labels_at(folder)
    if config.task.name.classifies and labels is not None:
        _take_labels(config, labels)
    if config.data.tokenizer is None:
        take(config, "data.tokenizer", str(_tokenizer_of(folder, config.init_from)))
    if not {"run.name", "experiment"} & given:
        ours = folder.parent.name == "checkpoints"  # runs/<name>/checkpoints/step-<N>
        base = (
            f"{folder.parent.parent.name}-{folder.name}"
            if ours
            else Path(config.init_from).name.strip(".") or folder.resolve().name
        )
        # The name of the network is not used, because a run with this name and other initial weights may exist.
        take(config, "run.name", f"from-{base}")


def take_special_tokens(config: DictConfig, overrides: Sequence[str]) -> None:
    """Take the ids of the bos, eos and pad tokens from the files of the tokenizer `data.tokenizer`.

    Ids on the command line (`overrides`) are kept. Raises: `UserError`, also if the network's embedding has too few
    rows for the tokens."""
    name = config.data.tokenizer
    if name is None:
        return
    tokenizer, changed = read_tokenizer(name), []
    check_size(tokenizer.tokenizer, name, config.model.vocab_size)
    given = {each.lstrip("+").partition("=")[0] for each in overrides}
    for key, number in tokenizer.ids.items():
        if f"model.{key}" not in given and config.model[key] != number:
            changed.append(f"model.{key}={number}, not {config.model[key]}")
            take(config, f"model.{key}", number)
    if changed:
        say(f"note: data.tokenizer={name} sets {', '.join(changed)}")


def inherit_for_evaluation(config: DictConfig, overrides: Sequence[str]) -> None:
    """Take the settings that affect a loss from the checkpoint of `init_from`.

    Settings on the command line (`overrides`) are kept. A training checkpoint has the task, the precision, the sequence
    length and the fields of the text. Another folder determines whether the task is classification, and its
    number of positions limits the sequence length. Raises: `UserError`."""
    if config.init_from is None:
        return
    folder = find_checkpoint(config.init_from, "init_from=")
    given = {each.lstrip("+").partition("=")[0] for each in overrides}
    if (folder / MANIFEST).is_file():
        saved = read_manifest(folder)["config"]
        fields = ("sequence_length", "text_field", "template", "special_tokens")
        taken = {f"data.{name}": saved["data"][name] for name in fields if name in saved["data"]}
        for section in ("task", "precision"):
            if section not in given:
                taken |= {f"{section}.{name}": value for name, value in saved.get(section, {}).items()}
    else:
        positions = model_at(folder, "init_from=").max_position_embeddings
        taken = {"data.sequence_length": min(config.data.sequence_length, positions)}
        if _is_classifier(folder) and "task" not in given:
            taken["task.name"] = Task.classify.name
    for key, value in taken.items():
        if key not in given:
            take(config, key, value)


def _require_same(config: DictConfig, name: str, theirs: Any) -> None:
    if name == "word_embed_proj_dim":  # null means the hidden size
        theirs = theirs or config.model.hidden_size
        ours = config.model[name] or config.model.hidden_size
    else:
        ours = config.model[name]
    if ours != theirs:
        raise UserError(
            f"model.{name}={getattr(ours, 'value', ours)}, but init_from={config.init_from} has "
            f"{getattr(theirs, 'value', theirs)}: remove the network's shape from the command line, or choose another "
            "checkpoint" + (f"; model.vocab_size={ours} alone adds rows to the embedding" * (name == "vocab_size"))
        )


def _require_may_grow(config: DictConfig, rows: int) -> None:
    if config.model.vocab_size > rows and config.task.lora.rank > 0:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the embedding of init_from={config.init_from} has {rows} "
            "rows, and LoRA cannot train new rows: add rows in a run with task.lora.rank=0, and adapt its checkpoint"
        )
    if config.model.vocab_size < rows:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the embedding of init_from={config.init_from} has {rows} "
            f"rows, and trained rows would be lost: set model.vocab_size to {rows} or more, or leave this setting out"
        )


def _tokenizer_of(folder: Path, name: str) -> Path:
    """The folder with the files of the checkpoint's tokenizer."""
    tokenizer = folder / "tokenizer" if (folder / MANIFEST).is_file() else folder
    files = {path.name for path in tokenizer.iterdir()} if tokenizer.is_dir() else set()
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files:
        return tokenizer
    raise UserError(
        f"init_from={name} has no tokenizer: set data.tokenizer=… to the tokenizer that the checkpoint was trained with"
    )
