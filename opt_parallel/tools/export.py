"""Export a checkpoint to a Hugging Face folder that transformers loads as OPTForCausalLM or
OPTForSequenceClassification, or to an adapter that `peft` loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from opt_parallel.checkpoint.damage import checksum_of, open_checked
from opt_parallel.checkpoint.inherit import labels_at, model_at
from opt_parallel.checkpoint.lora import Merged, lora_of
from opt_parallel.checkpoint.manifest import MANIFEST, read_manifest
from opt_parallel.checkpoint.memory import largest_parameter, require_memory
from opt_parallel.checkpoint.sources import Opened, open_checkpoint
from opt_parallel.config.model import Labels
from opt_parallel.config.output import ExportDtype
from opt_parallel.huggingface.card import metrics_of, model_card
from opt_parallel.huggingface.config import (
    ADAPTER_CONFIG,
    CLASSIFIER,
    as_json,
    config_for_hf,
    labels_for_hf,
    read_labels,
)
from opt_parallel.huggingface.folder import GENERATION_CONFIG, generation_config, write_folder
from opt_parallel.huggingface.hub import INDEX_SUFFIX
from opt_parallel.huggingface.hub import WEIGHTS as FORMATS
from opt_parallel.huggingface.tokenizer import files_for, special_tokens_in
from opt_parallel.metaseq.weights import Turns
from opt_parallel.model.heads import SCORE, CausalLM, SequenceClassifier
from opt_parallel.model.lora import ADAPTER_WEIGHTS, config_for_peft, to_peft
from opt_parallel.parallel.shard import Constant, Shard, marked
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say
from opt_parallel.storage.foreign import content_of, file_in
from opt_parallel.tools.progress import ahead, shown

CARD, BASE = "README.md", "base"
SHARD = 5 * 10**9  # Maximum number of bytes of a weights file of an adapter's base model.
ORIGIN = "checkpoint.json"  # Name of the file that identifies the exported checkpoint.
COPIES = 3  # Copies of a tensor in memory besides the exported one: as read, the next one, and a rearranged one.


def export(
    checkpoint: Path,
    output: Path,
    max_shard_size: int,
    dtype: ExportDtype,
    replace: bool = False,
    md5: Path | None = None,
) -> None:
    """Export `checkpoint` atomically to the folder `output`, in files of at most `max_shard_size` bytes.

    The tied output projection is written once, and vocabulary padding is not written. The files of a metaseq checkpoint
    are first compared with the MD5 sums in the list `md5`. Raises: UserError."""
    if output.exists() and not replace:
        raise UserError(f"--output {output} exists: remove it or choose another folder")
    opened = open_checkpoint(checkpoint, checksums=True)
    opened.check_md5("--md5 ", md5)
    stored = opened.dtype if dtype is ExportDtype.auto else getattr(torch, dtype.value)
    content = config_for_hf(opened.config, stored)
    model: CausalLM | SequenceClassifier
    with torch.device("meta"):
        if opened.is_classifier:
            opened.check_classifier()
            model = SequenceClassifier(opened.config, len(opened.labels.names), ALONE)
            content |= {"architectures": [CLASSIFIER], **labels_for_hf(opened.labels)}
        else:
            opened.check_language_model()
            model = CausalLM(opened.config, ALONE)
    parameters = [(name, shard) for name, _, shard in marked(model)]
    a_value = COPIES * opened.stored.dtype.itemsize + stored.itemsize
    needed = a_value * largest_parameter(opened)
    require_memory(f"{checkpoint}: exporting its largest tensor", needed, "free memory, or raise the limit")
    files = _other_files(opened)
    total = sum(shard.numel for _, shard in parameters)
    if opened.metaseq:
        opened.metaseq.memory = Turns(2)
    with shown("export", opened.weights, total) as weights, ahead(weights, parameters) as source:
        write_folder(output, content, parameters, source, stored, max_shard_size, files, replace=replace)
    if opened.metaseq:
        opened.warn_of_not_finite(ALONE)


def is_of(output: Path, checkpoint: Path) -> bool:
    """Whether `output` is an export of `checkpoint`. Exports by earlier versions of this package do not name their
    checkpoint, so the answer is False for them."""
    try:
        return json.loads((output / ORIGIN).read_bytes()) == _origin(checkpoint)
    except (OSError, ValueError, RecursionError):
        return False


def _origin(checkpoint: Path) -> dict[str, Any]:
    """The step of the checkpoint, and the CRC-32 of its manifest, which holds the checksums of all files."""
    path = checkpoint / MANIFEST
    return {"step": read_manifest(checkpoint)["clock"]["step"], "manifest_crc32": checksum_of(path)}


def export_adapter(checkpoint: Path, output: Path, dtype: ExportDtype) -> None:
    """Export the trained tensors of a LoRA run atomically to `output` as a PEFT adapter.

    peft reads the network and a classifier's labels from the base model that the adapter names. If transformers cannot
    read the run's base model, or the base model lacks these labels, the base model is also written to `output`/base
    with the labels. Raises: UserError."""
    if output.exists():
        raise UserError(f"--output {output} exists: remove it or choose another folder")
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(
            f"--checkpoint {checkpoint} is not a training checkpoint, which --adapter needs: name a folder "
            "…/checkpoints/step-<N>"
        )
    trained = open_checked(checkpoint)
    lora, labels = lora_of(trained.manifest), labels_at(checkpoint)
    if lora.rank == 0:
        raise UserError(f"--adapter: {checkpoint} was not trained with LoRA: export it without --adapter")
    model, base = model_at(checkpoint, "--checkpoint "), str(trained.manifest["base"]["checkpoint"])
    tokenizer = files_for(checkpoint / "tokenizer", model)
    serves = _serves(base, labels)
    named = base if serves else str((output / BASE).absolute())
    metrics = metrics_of(checkpoint, trained.manifest["clock"]["step"])
    card = model_card(model, trained.manifest, metrics, labels, special_tokens_in(tokenizer), named)
    write_folder(
        output,
        config_for_peft(lora, named, trained.holds(SCORE)),
        [(name, Shard(shape, 0, 0, 1, Constant(0.0), False)) for name, shape in trained.shapes.items()],
        trained,
        torch.float32 if dtype is ExportDtype.auto else getattr(torch, dtype.value),
        sys.maxsize,  # peft reads an adapter from one file
        tokenizer | {ORIGIN: as_json(_origin(checkpoint)), CARD: card},
        to_theirs=lambda name, values: to_peft(name, values, lora.targets),
        names=(ADAPTER_WEIGHTS, ADAPTER_CONFIG),
        beside=lambda folder: None if serves else _write_base(checkpoint, folder / BASE, labels, tokenizer),
    )
    if not serves:
        say(f"the adapter's base model is written to {named}, because peft cannot use {base}")


def _serves(base: str, labels: Labels | None) -> bool:
    """Whether peft, which loads the base model with transformers, finds the run's network and `labels` in `base`."""
    folder = Path(base)
    if not folder.is_dir():
        return labels is None  # `base` is a hub id
    readable = [name for single in FORMATS[:2] for name in (single, single + INDEX_SUFFIX) if file_in(folder, name)]
    if (folder / MANIFEST).is_file() or not readable:
        return False
    return labels is None or read_labels(folder) == labels


def _write_base(checkpoint: Path, output: Path, labels: Labels | None, tokenizer: dict[str, bytes]) -> None:
    """Write the base model of a LoRA run, a language model, with `labels` in its configuration."""
    opened = open_checkpoint(checkpoint)
    assert isinstance(opened.stored, Merged)
    weights = opened.stored.base
    dtype = torch.float32 if weights.dtype is torch.float64 else weights.dtype
    content = config_for_hf(opened.config, dtype) | (labels_for_hf(labels) if labels else {})
    with torch.device("meta"):
        parameters = [(name, shard) for name, _, shard in marked(CausalLM(opened.config, ALONE))]
    files = tokenizer | {GENERATION_CONFIG: generation_config(opened.config)}
    write_folder(output, content, parameters, weights, dtype, SHARD, files)


def _contents(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The contents of the existing files among `names`. Raises: UserError if a file is not a regular file of the
    folder."""
    found = {name: content_of(folder, name) for name in names}
    return {name: content for name, content in found.items() if content is not None}


def _other_files(opened: Opened) -> dict[str, bytes]:
    """The files of the tokenizer, the generation settings and the model card. A Hugging Face folder's own files are
    copied if they exist."""
    tokenizer = files_for(opened.tokenizer, opened.config)
    if not tokenizer:
        say(f"warning: {opened.tokenizer} holds no tokenizer, so the export has no tokenizer")
    labels, tokens = opened.labels if opened.is_classifier else None, special_tokens_in(tokenizer)
    files = {} if labels else {GENERATION_CONFIG: generation_config(opened.config)}
    if (opened.folder / MANIFEST).is_file():
        manifest = read_manifest(opened.folder)
        metrics = metrics_of(opened.folder, manifest["clock"]["step"])
        files[CARD] = model_card(opened.config, manifest, metrics, labels, tokens)
        return files | tokenizer | {ORIGIN: as_json(_origin(opened.folder))}
    files[CARD] = model_card(opened.config, None, [], labels, tokens)
    return files | tokenizer | _contents(opened.folder, (GENERATION_CONFIG, CARD, ORIGIN))
