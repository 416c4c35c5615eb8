"""A checkpoint → a Hugging Face folder that transformers loads as OPTForCausalLM or OPTForSequenceClassification."""

from __future__ import annotations

from pathlib import Path

import torch

from opt_parallel.checkpoint.card import metrics_of, model_card
from opt_parallel.checkpoint.reading import Opened, open_checkpoint
from opt_parallel.checkpoint.writing import GENERATION_CONFIG, generation_config, write_folder
from opt_parallel.config import ExportDtype
from opt_parallel.errors import UserError
from opt_parallel.hf_config import CLASSIFIER
from opt_parallel.log import say
from opt_parallel.manifest import MANIFEST, read_manifest
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.hf import config_for_hf, labels_for_hf
from opt_parallel.parallel.shard import marked
from opt_parallel.topology import ALONE

TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
CARD = "README.md"


def export(checkpoint: Path, output: Path, max_shard_size: int, dtype: ExportDtype, replace: bool = False) -> None:
    """Write `checkpoint` to `output`: whole or absent, files of `max_shard_size` bytes at most.

    A tied head is not written twice, vocabulary padding not at all. Raises: UserError."""
    if output.exists() and not replace:
        raise UserError(f"--output {output} exists: remove it or choose another folder")
    opened = open_checkpoint(checkpoint)
    stored = getattr(torch, dtype.value)
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
    files = _other_files(opened)
    write_folder(output, content, parameters, opened.weights, stored, max_shard_size, files, replace=replace)


def _other_files(opened: Opened) -> dict[str, bytes]:
    """Tokenizer, generation settings and model card; a Hugging Face folder's own where it has them."""
    found = {name: opened.tokenizer / name for name in TOKENIZER_FILES}
    if not any(path.is_file() for path in found.values()):
        say(f"warning: {opened.tokenizer} holds no tokenizer, so the export has none")
    labels = opened.labels if opened.is_classifier else None
    files = {} if labels else {GENERATION_CONFIG: generation_config(opened.config)}
    if (opened.folder / MANIFEST).is_file():
        manifest = read_manifest(opened.folder)
        files[CARD] = model_card(opened.config, manifest, metrics_of(opened.folder, manifest["clock"]["step"]), labels)
    else:
        files[CARD] = model_card(opened.config, None, [], labels)
        found |= {name: opened.folder / name for name in (GENERATION_CONFIG, CARD)}
    return files | {name: path.read_bytes() for name, path in found.items() if path.is_file()}
