"""A checkpoint → a Hugging Face folder that transformers loads as OPTForCausalLM or OPTForSequenceClassification, or an
adapter that `peft` loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from opt_parallel.checkpoint.card import metrics_of, model_card
from opt_parallel.checkpoint.damage import checksum_of, read_whole
from opt_parallel.checkpoint.merged import lora_of
from opt_parallel.checkpoint.reading import Opened, open_checkpoint
from opt_parallel.checkpoint.room import require_room
from opt_parallel.checkpoint.writing import GENERATION_CONFIG, as_json, generation_config, write_folder
from opt_parallel.compose import model_at
from opt_parallel.errors import UserError
from opt_parallel.hf_config import ADAPTER_CONFIG, CLASSIFIER
from opt_parallel.hf_tokenizer import files_for, special_tokens_in
from opt_parallel.log import say
from opt_parallel.manifest import MANIFEST, read_manifest
from opt_parallel.model.heads import SCORE, CausalLM, SequenceClassifier
from opt_parallel.model.hf import config_for_hf, labels_for_hf
from opt_parallel.model.lora import ADAPTER_WEIGHTS, config_for_peft, to_peft
from opt_parallel.output_config import ExportDtype
from opt_parallel.parallel.shard import Constant, Shard, marked
from opt_parallel.storage.foreign import content_of
from opt_parallel.topology import ALONE

CARD = "README.md"
ORIGIN = "checkpoint.json"  # which checkpoint of ours an export is of
COPIES = 3  # of a tensor in fp32 that are in memory at most: as it was read, merged or rearranged, as it is written


def export(checkpoint: Path, output: Path, max_shard_size: int, dtype: ExportDtype, replace: bool = False) -> None:
    """Write `checkpoint` to `output`: whole or absent, files of `max_shard_size` bytes at most.

    A tied head is not written twice, vocabulary padding not at all. Raises: UserError."""
    if output.exists() and not replace:
        raise UserError(f"--output {output} exists: remove it or choose another folder")
    opened = open_checkpoint(checkpoint, checksums=True)
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
    largest = max(shard.numel for _, shard in parameters)
    require_room(f"{checkpoint}: exporting its largest tensor", COPIES * 4 * largest, "free some, or raise the limit")
    files = _other_files(opened)
    write_folder(output, content, parameters, opened.weights, stored, max_shard_size, files, replace=replace)


def is_of(output: Path, checkpoint: Path) -> bool:
    """Whether `output` is an export of that checkpoint; False for one of an earlier version, which does not say."""
    try:
        return json.loads((output / ORIGIN).read_bytes()) == _origin(checkpoint)
    except (OSError, ValueError, RecursionError):
        return False


def _origin(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's step, and the CRC-32 of its manifest, in which the checksums of all its files stand."""
    path = checkpoint / MANIFEST
    return {"step": read_manifest(checkpoint)["clock"]["step"], "manifest_crc32": checksum_of(path)}


def export_adapter(checkpoint: Path, output: Path, dtype: ExportDtype) -> None:
    """Write what a LoRA run trained to `output` as a PEFT adapter: whole or absent. The base is not read.

    Raises: UserError."""
    if output.exists():
        raise UserError(f"--output {output} exists: remove it or choose another folder")
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"--adapter --checkpoint {checkpoint} is no training checkpoint (…/checkpoints/step-<N>)")
    trained = read_whole(checkpoint)
    lora = lora_of(trained.manifest)
    if lora.rank == 0:
        raise UserError(f"--adapter: {checkpoint} trained every parameter, not LoRA: export it without --adapter")
    base: str | None = trained.manifest["base"]["checkpoint"]
    if base is not None and (Path(base) / MANIFEST).is_file():
        say(f"warning: the base {base} is a training checkpoint, so the adapter names none: export the base too")
        base = None
    write_folder(
        output,
        config_for_peft(lora, base, trained.holds(SCORE)),
        [(name, Shard(shape, 0, 0, 1, Constant(0.0), False)) for name, shape in trained.shapes.items()],
        trained,
        torch.float32 if dtype is ExportDtype.auto else getattr(torch, dtype.value),
        sys.maxsize,  # peft knows no adapter of several files
        files_for(checkpoint / "tokenizer", model_at(checkpoint, "--checkpoint "))
        | {ORIGIN: as_json(_origin(checkpoint))},
        to_theirs=lambda name, values: to_peft(name, values, lora.targets),
        names=(ADAPTER_WEIGHTS, ADAPTER_CONFIG),
    )


def _contents(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Those of the files that are there, by name. Raises: UserError if one is not a regular file of the folder."""
    found = {name: content_of(folder, name) for name in names}
    return {name: content for name, content in found.items() if content is not None}


def _other_files(opened: Opened) -> dict[str, bytes]:
    """Tokenizer, generation settings and model card; a Hugging Face folder's own where it has them."""
    tokenizer = files_for(opened.tokenizer, opened.config)
    if not tokenizer:
        say(f"warning: {opened.tokenizer} holds no tokenizer, so the export has none")
    labels, tokens = opened.labels if opened.is_classifier else None, special_tokens_in(tokenizer)
    files = {} if labels else {GENERATION_CONFIG: generation_config(opened.config)}
    if (opened.folder / MANIFEST).is_file():
        manifest = read_manifest(opened.folder)
        metrics = metrics_of(opened.folder, manifest["clock"]["step"])
        files[CARD] = model_card(opened.config, manifest, metrics, labels, tokens)
        return files | tokenizer | {ORIGIN: as_json(_origin(opened.folder))}
    files[CARD] = model_card(opened.config, None, [], labels, tokens)
    return files | tokenizer | _contents(opened.folder, (GENERATION_CONFIG, CARD, ORIGIN))
