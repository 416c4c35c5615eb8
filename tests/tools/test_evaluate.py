"""scripts/evaluate.py: the same number in any layout, transformers' own, and that of the run that was validated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifying import their_model
from command import python, small, write_text
from composing import run_of
from hugging_face import random_model
from layouts import Layout
from safetensors.torch import load_file, save_file
from training import trained

from opt_parallel.config.run import ParallelConfig, Run
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import prepare_validation
from opt_parallel.data.tasks import open_validation
from opt_parallel.runtime.errors import UserError


def evaluation_of(*arguments: str) -> Run:
    """The run that `evaluate` makes of a command line."""
    return run_of(*arguments, evaluation=True)


def judged(run: Run) -> dict[str, Any]:
    """On the crew."""
    from opt_parallel.tools.evaluate import evaluate

    return evaluate(run)


LAYOUTS = [Layout(micro=3), Layout(tensor=2, micro=1), Layout(data=2, micro=4)]


def in_all_layouts(crew: Any, run: Run) -> list[dict[str, Any]]:
    answers = []
    for layout in LAYOUTS:
        spread = dataclasses.replace(
            run, parallel=ParallelConfig(tensor=layout.tensor), batch={"global": 8, "micro": layout.micro}
        )
        answers += crew(layout.world)(judged, spread)
    return answers


def test_a_language_models_loss_is_transformers_in_any_layout(crew: Any, tmp_path: Path) -> None:
    model = random_model({"vocab_size": 300})
    model.save_pretrained(tmp_path / "theirs")
    text = write_text(tmp_path, 59)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    save_tokenizer(train_tokenizer(documents, 300), tmp_path / "theirs")
    run = evaluation_of(
        f"init_from={tmp_path / 'theirs'}", f"data.validation={text}", f"run.dir={tmp_path / 'out'}", "precision=fp32",
        f"data.cache={tmp_path / 'cache'}",
    )  # fmt: skip
    assert run.data.sequence_length == 32  # the network's positions, which are fewer than the default
    samples = open_validation(run, prepare_validation(run))
    assert samples is not None
    with torch.no_grad():
        losses = []
        for number in range(len(samples)):
            row = samples.sample(number)
            logits = model(input_ids=torch.from_numpy(row.ids)[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(row.labels)))
    expected = float(torch.stack(losses).mean())
    assert len(samples) % 8  # the last batches are not full
    for answer in in_all_layouts(crew, run):
        assert answer["loss"] == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order
        assert answer["tokens"] == 32 * len(samples)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["loss"] == pytest.approx(expected, rel=1e-5)
    assert written["perplexity"] == pytest.approx(float(torch.tensor(expected).exp()), rel=1e-4)


def test_a_classifiers_figures_are_transformers_in_any_layout(crew: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = their_model("single", tmp_path / "theirs")
    names = [model.config.id2label[number] for number in range(3)]
    rows = [{"text": f"Text number {each * each}.", "label": names[each % 3]} for each in range(11)]
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(train_tokenizer([row["text"] for row in rows], 300), tmp_path / "theirs")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    labels = torch.tensor([each % 3 for each in range(11)])
    with torch.no_grad():
        output = model.eval()(inputs.input_ids, inputs.attention_mask, labels=labels)
    run = evaluation_of(
        f"init_from={tmp_path / 'theirs'}", f"data.validation={path}", f"run.dir={tmp_path / 'out'}", "precision=fp32",
        f"data.cache={tmp_path / 'cache'}",
    )  # fmt: skip
    for answer in in_all_layouts(crew, run):
        assert answer["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
        assert answer["accuracy"] == pytest.approx(float((output.logits.argmax(1) == labels).double().mean()))
        assert answer["examples"] == 11
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["labels"] == names
    assert [sum(row) for row in written["confusion"]] == [4, 4, 3]
    assert (tmp_path / "out" / "confusion.png").is_file()


def test_two_arguments_give_the_runs_own_validation_loss(crew: Any, tmp_path: Path) -> None:
    more = [f"data.validation={tmp_path / 'text.jsonl'}", "steps=2", "evaluation.every=2"]
    arguments = [*small(tmp_path), *more]
    assert trained(crew(1), *arguments).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["kind"] == "validation"]
    two = [f"init_from={tmp_path / 'run' / 'checkpoints' / 'step-2'}", f"data.validation={tmp_path / 'text.jsonl'}"]
    process = python("scripts/evaluate.py", *two, f"run.dir={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}")
    assert process.returncode == 0, process.stderr
    assert f"loss: {row['loss']:.6g}"[:11] in process.stdout  # to the fifth digit
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["loss"] == pytest.approx(row["loss"], rel=1e-6)
    assert written["precision"] == "fp32"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    from opt_parallel.tools.evaluate import evaluate

    text = write_text(tmp_path)
    model = their_model("single", tmp_path / "classifier")
    random_model({"vocab_size": 300}).save_pretrained(tmp_path / "language")
    for name in ("classifier", "language"):
        save_tokenizer(train_tokenizer(["some text"], 300), tmp_path / name)
    common = ["precision=fp32", f"run.dir={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}"]
    cases: list[tuple[list[str], str]] = [
        ([], "init_from is not set"),
        (["init_from=" + str(tmp_path / "nothing")], "does not exist"),
        (["init_from=" + str(tmp_path / "language")], "data.validation is not set"),
        (["init_from=" + str(tmp_path / "language"), "task=classify"], "is a language model and has no labels"),
        (["init_from=" + str(tmp_path / "classifier"), "task=pretrain"], "is a classifier"),
        (["init_from=" + str(tmp_path / "classifier"), f"data.validation={text}"], "line 1 has no field 'label'"),
    ]
    for arguments, line in cases:
        with pytest.raises(UserError, match=line) as caught:
            evaluate(evaluation_of(*common, *arguments))
        assert "\n" not in str(caught.value)
    model.config.id2label = {number: f"LABEL_{number}" for number in range(3)}
    model.config.save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match=r"has no names for its 3 labels: set task\.labels"):
        evaluate(evaluation_of(*common, f"init_from={tmp_path / 'classifier'}", f"data.validation={text}"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small model in Hugging Face's form, and beside it a text."""
    random_model({"vocab_size": 300}).save_pretrained(tmp_path / "theirs")
    documents = [json.loads(line)["text"] for line in write_text(tmp_path, 20).read_text().splitlines()]
    save_tokenizer(train_tokenizer(documents, 300), tmp_path / "theirs")
    return tmp_path


def evaluated(folder: Path, *overrides: str) -> Run:
    return evaluation_of(
        f"init_from={folder / 'theirs'}", f"data.validation={folder / 'text.jsonl'}", f"run.dir={folder / 'out'}",
        f"data.cache={folder / 'cache'}", "precision=fp32", *overrides,
    )  # fmt: skip


def refused(run: Run) -> str:
    """On the crew: the mistake that evaluating ends with."""
    from opt_parallel.tools.evaluate import evaluate

    try:
        return f"no mistake, but {evaluate(run)}"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_have_no_loss(crew: Any, base: Path, value: float) -> None:
    """Not even where the text does not touch them: a row of positions that no sample reaches."""
    path, name = base / "theirs" / "model.safetensors", "model.decoder.embed_positions.weight"
    tensors = load_file(path)
    tensors[name][-1, 0] = value
    save_file(tensors, path, {"format": "pt"})
    answers = crew(2)(refused, evaluated(base, "parallel.tensor=2", "data.sequence_length=16"))
    assert answers[0] == answers[1]
    assert "not finite" in answers[0]
    assert "embed_positions.weight" in answers[0]
    assert not (base / "out" / "evaluation.json").exists()


def test_a_loss_that_is_not_finite_is_a_mistake(crew: Any, base: Path) -> None:
    """Finite weights, whose products overflow."""
    path, name = base / "theirs" / "model.safetensors", "model.decoder.final_layer_norm.weight"
    tensors = load_file(path)
    tensors[name][:] = 3e38
    save_file(tensors, path, {"format": "pt"})
    (answer,) = crew(1)(refused, evaluated(base))
    assert "no finite loss" in answer
    assert str(base / "theirs") in answer
    assert not (base / "out" / "evaluation.json").exists()
