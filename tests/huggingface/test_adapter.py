"""An adapter alone: `peft` loads its folder, with the labels, and finds the base model that it was trained on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import random_model, write_h5
from layouts import Layout
from lora_runs import random_adapter, run_on, write_base

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.config.run import Run
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export_adapter

WORDS, NAMES = {"vocab_size": 300}, ("warm | `x`", "cold", "wet")
CPU = torch.device("cpu")


def ids() -> torch.Tensor:
    return torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def trained(crew: Any, base: Path, folder: Path, classifies: bool) -> Path:
    """The checkpoint of a LoRA run that adapts `base`."""
    save_tokenizer(train_tokenizer(["the cat sat on the mat"] * 9, 300), folder / "tokenizer")
    run: Run = run_on(base, folder, Layout())
    if classifies:
        run = dataclasses.replace(run, task=TaskConfig(name=Task.classify, lora=run.task.lora))
    crew(1)(random_adapter, run, 3, NAMES if classifies else ())
    return folder / "checkpoints" / "step-0"


def base_of(kind: str, crew: Any, folder: Path) -> Path:
    """What a run can stand on: transformers', with another head or these labels; TensorFlow's; one of ours."""
    if kind == "ours":
        return trained(crew, write_base(folder / "first", **WORDS), folder / "run", classifies=False)
    if kind == "h5":
        write_h5(random_model(WORDS), folder, "single")
        return folder
    named = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)},
             "problem_type": "single_label_classification"} if kind == "classifier" else {}  # fmt: skip
    architecture = "OPTForSequenceClassification" if kind == "classifier" else "OPTForCausalLM"
    return write_base(folder, "pre-norm", architecture, **WORDS, **named)


def settings_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", ["language model", "classifier", "h5", "ours"])
def test_a_classifiers_adapter_needs_nothing_else(crew: Any, tmp_path: Path, kind: str) -> None:
    from peft import AutoPeftModelForSequenceClassification

    base = base_of(kind, crew, tmp_path / "base")
    saved, adapter = trained(crew, base, tmp_path / "run", classifies=True), tmp_path / "adapter"
    export_adapter(saved, adapter, ExportDtype.float32)
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter).eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.problem_type == "single_label_classification"
    with torch.no_grad():
        ours = open_checkpoint(saved).classifier(3, ALONE, CPU)(ids())
        torch.testing.assert_close(model(input_ids=ids()).logits, ours, rtol=1e-5, atol=1e-5)  # fp32, another order
    named = settings_of(adapter)["base_model_name_or_path"]
    assert named == str(base if kind == "classifier" else adapter / "base")
    assert (adapter / "base").exists() == (kind != "classifier")


@pytest.mark.parametrize("kind", ["language model", "h5", "ours"])
def test_a_language_models_adapter_names_a_base_that_transformers_reads(crew: Any, tmp_path: Path, kind: str) -> None:
    from peft import AutoPeftModelForCausalLM

    base = base_of(kind, crew, tmp_path / "base")
    saved, adapter = trained(crew, base, tmp_path / "run", classifies=False), tmp_path / "adapter"
    export_adapter(saved, adapter, ExportDtype.float32)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        ours = open_checkpoint(saved).model(ALONE, CPU)(ids())
        torch.testing.assert_close(model(input_ids=ids()).logits, ours, rtol=1e-5, atol=1e-5)  # fp32, another order
    assert (adapter / "base").exists() == (kind != "language model")  # a copy of it would be for nothing


def test_the_card_and_the_tokenizer_are_the_runs(crew: Any, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from transformers import AutoTokenizer

    base = base_of("classifier", crew, tmp_path / "base")
    saved, adapter = trained(crew, base, tmp_path / "run", classifies=True), tmp_path / "adapter"
    export_adapter(saved, adapter, ExportDtype.float32)
    card = ModelCard.load(adapter / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    assert card.data.base_model is None  # what lies here means nothing on the hub
    assert all(word in card.text for word in (str(base), "`cold`, `wet`", "AutoPeftModelForSequenceClassification"))
    assert r"``warm \| `x` ``" in card.text or r"``warm \| `x```" in card.text
    theirs, config = AutoTokenizer.from_pretrained(adapter), open_checkpoint(saved).config
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [
        config.bos_token_id, config.eos_token_id, config.pad_token_id,
    ]  # fmt: skip


def test_a_base_that_is_gone_leaves_nothing(crew: Any, tmp_path: Path) -> None:
    base = base_of("language model", crew, tmp_path / "base")
    saved = trained(crew, base, tmp_path / "run", classifies=True)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"needs its base: .*base does not exist"):
        export_adapter(saved, tmp_path / "adapter", ExportDtype.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run"]
