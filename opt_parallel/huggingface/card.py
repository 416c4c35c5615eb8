"""Writes the model card (README.md) of an exported folder, with facts about the network and its training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from opt_parallel.config.model import Labels, ModelConfig
from opt_parallel.huggingface.hub import HUB_ID
from opt_parallel.storage.rows import METRICS, rows_of

# The description of the model, its class in transformers, and its pipeline tag on the hub.
LANGUAGE_MODEL = ("An OPT language model", "OPTForCausalLM", "text-generation")
SEQUENCE_CLASSIFIER = ("An OPT classifier", "OPTForSequenceClassification", "text-classification")


def model_card(
    model: ModelConfig,
    manifest: dict[str, Any] | None,
    rows: list[dict[str, Any]],
    labels: Labels | None = None,
    tokens: Mapping[int, str] | None = None,
    base: str | None = None,
) -> bytes:
    """The content of README.md.

    Args:
        manifest: the manifest of a training checkpoint, or None for weights whose training is unknown.
        rows: the run's metrics up to the checkpoint.
        labels: the labels of a classifier.
        tokens: the tokenizer's special tokens by id.
        base: the checkpoint to which peft applies a LoRA adapter, or None if the export is not an adapter."""
    name = "OPT" if manifest is None else manifest["config"]["run"]["name"]
    network = {
        "parameters": f"{model.parameters():,}",
        "layers": model.num_hidden_layers,
        "hidden size": model.hidden_size,
        "attention heads": model.num_attention_heads,
        "feed-forward size": model.ffn_dim,
        "vocabulary": model.vocab_size,
        "positions": model.max_position_embeddings,
    }
    for what, number in (
        ("begins", model.bos_token_id),
        ("ends", model.eos_token_id),
        ("is padded", model.pad_token_id),
    ):
        network[f"a text {what} with"] = f"{code((tokens or {}).get(number, ''))} {number}".strip()
    kind, theirs, pipeline = LANGUAGE_MODEL if labels is None else SEQUENCE_CLASSIFIER
    parts = [_head(pipeline, base), f"# {name}\n"]
    if base is None:
        parts.append(f"{kind}, written by opt-parallel for `{theirs}`.\n")
    else:
        auto = "AutoPeftModelForCausalLM" if labels is None else "AutoPeftModelForSequenceClassification"
        parts.append(f"A LoRA adapter of {kind[0].lower()}{kind[1:]}, written by opt-parallel for `peft.{auto}`, which "
                     f"applies it to {code(base)}; adapter_config.json names this base.\n")  # fmt: skip
    parts += ["## Network\n", _table(network.items())]
    if labels is not None:
        problem = "unknown" if labels.problem_type is None else labels.problem_type.value
        parts += ["## Labels\n", f"{', '.join(map(code, labels.names))} ({problem})\n"]
    if manifest is not None:
        unit = "nats per token" if labels is None else "mean of the examples"
        parts += ["## Training\n", _table(_training(manifest, rows, unit))]
        configuration = yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True)
        parts += ["## Configuration\n", f"```yaml\n{configuration}```\n"]
    return "\n".join(parts).encode()


def _head(pipeline: str, base: str | None) -> str:
    """The metadata of the card for the hub. A base in a local folder is left out, because the hub cannot find it."""
    facts: dict[str, Any] = {
        "library_name": "transformers" if base is None else "peft",
        "pipeline_tag": pipeline,
        "tags": ["opt", "opt-parallel", *([] if base is None else ["lora"])],
    }
    if base is not None and HUB_ID.fullmatch(base):
        facts["base_model"] = base
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def metrics_of(checkpoint: Path, step: int) -> list[dict[str, Any]]:
    """The metrics up to `step` of the run whose folder contains `checkpoint`.

    The list is empty if the checkpoint was moved or renamed. A renamed checkpoint means that the run resumed from an
    earlier checkpoint, so the metrics at these steps belong to the later training."""
    path = checkpoint.absolute().parent.parent / METRICS
    if checkpoint.name != f"step-{step}" or not path.is_file():
        return []
    return [row for row in rows_of(path) if row["step"] <= step]


def _training(manifest: dict[str, Any], rows: list[dict[str, Any]], unit: str) -> list[tuple[str, Any]]:
    config, clock = manifest["config"], manifest["clock"]
    facts = [
        ("started from", _listed(config.get("init_from"))),
        ("training text", _listed(config["data"]["train"])),
        ("validation text", _listed(config["data"]["validation"])),
        ("tokens of a sequence", config["data"]["sequence_length"]),
        ("steps", f"{clock['step']:,} of {config['steps']:,}"),
        ("sequences", f"{clock['samples']:,}"),
        ("tokens", f"{clock['tokens']:,}"),
    ]
    for kind, what in (("train", "training loss"), ("validation", "validation loss")):
        of_kind = [row for row in rows if row["kind"] == kind and row["loss"] is not None]
        if of_kind:
            facts.append((f"{what}, {unit}, step {of_kind[-1]['step']:,}", f"{of_kind[-1]['loss']:.4f}"))
    return [(name, value) for name, value in facts if value]


def code(text: str) -> str:
    """Text as inline code in a Markdown table. Characters that would end the code or the table's cell are escaped."""
    plain = text if text.isprintable() else repr(text)
    quotes = "``" if "`" in plain else "`"
    return f"{quotes}{plain}{quotes}".replace("|", "\\|") if text else ""


def _listed(texts: Any) -> str:
    return ", ".join(code(str(text)) for text in ([texts] if isinstance(texts, str) else texts or []))


def _table(facts: Iterable[tuple[str, Any]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in facts)
