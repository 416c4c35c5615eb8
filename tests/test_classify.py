"""task=classify: transformers' losses and weights in any layout, and what train.py, export and resuming make of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifying import HELD_OUT, PROBLEMS, Examples, run_of, their_model, train, train_theirs
from layouts import Layout, assemble
from training import trained

from opt_parallel.config.output import EvaluationConfig
from opt_parallel.config.run import Run
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.samples.samples import collate
from opt_parallel.model.heads import classification_loss, example_losses
from opt_parallel.report.scores import figures, tally
from opt_parallel.runtime.errors import UserError

WORDS = {"good": ["fine", "lovely", "great"], "bad": ["awful", "dull", "poor"]}


def some_labels(problem: str) -> torch.Tensor:
    samples = Examples(problem, 6)
    return collate([samples.sample(number) for number in range(6)], range(6), 1).labels


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_mean_of_the_examples_is_transformers_loss(problem: str) -> None:
    labels, problem_type = some_labels(problem), PROBLEMS[problem].problem_type
    assert problem_type is not None
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(6, len(PROBLEMS[problem].names), dtype=torch.float64, generator=generator).requires_grad_()
    losses = example_losses(scores, labels, problem_type)
    torch.testing.assert_close(losses.mean(), classification_loss(scores, labels, problem_type), rtol=1e-12, atol=0)
    hidden = labels.clone()
    hidden[2] = -100 if problem == "single" else float("nan")
    partly = example_losses(scores, hidden, problem_type)
    assert partly[2] == 0
    (gradient,) = torch.autograd.grad(partly.sum(), scores)
    assert bool((gradient[2] == 0).all())
    assert bool(gradient.isfinite().all())


LAYOUTS = [
    ("single", Layout(tensor=2, stage=3, micro=4, recompute="full")),
    pytest.param("single", Layout(tensor=2, data=2, stage=3, micro=2, recompute="full"), marks=pytest.mark.long),
    ("single", Layout(data=2, stage=2, micro=4)),
    ("multi", Layout(tensor=2, stage=1, micro=4)),
    pytest.param("multi", Layout(tensor=2, data=2, stage=1, micro=2), marks=pytest.mark.long),
    ("regression", Layout(tensor=2, stage=0, micro=4, sequence=False)),
    ("regression", Layout(data=2, stage=3, micro=2)),
]


@pytest.mark.parametrize(("problem", "layout"), LAYOUTS, ids=str)
def test_losses_weights_and_figures_are_transformers(crew: Any, tmp_path: Path, problem: str, layout: Layout) -> None:
    from opt_parallel.huggingface.names import to_hf

    run = run_of(layout, problem)
    theirs = their_model(problem, tmp_path)
    expected = train_theirs(theirs, run, problem)
    answers = crew(layout.world)(train, run, problem, str(tmp_path))
    samples, problem_type = Examples(problem, HELD_OUT, 100), PROBLEMS[problem].problem_type
    batch = collate([samples.sample(number) for number in range(HELD_OUT)], range(HELD_OUT), 1)
    assert batch.segments is not None
    assert problem_type is not None
    with torch.no_grad():
        output = theirs.eval()(batch.ids, (batch.segments > 0).long(), labels=batch.labels)
    wanted = figures(tally(output.logits.numpy(), batch.labels.numpy(), problem_type), problem_type)
    for losses, found, _ in answers:
        assert losses == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order, three steps of Adam
        assert found.loss == pytest.approx(output.loss.item(), rel=1e-5)
        assert found.figures == pytest.approx(wanted, rel=1e-4)
        assert found.targets == HELD_OUT
    for name, values in assemble([weights for _, _, weights in answers]).items():
        for their_name, part in to_hf(name, values).items():
            # Adam divides by the gradient's own size, so where that is near 0 its rounding shows
            torch.testing.assert_close(part, theirs.get_parameter(their_name), rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def plain(crew: Any) -> Any:
    """The losses, the validation result and the weights of a run without dropout on one process."""
    return crew(1)(train, run_of(Layout(micro=8), "single"), "single", None)[0]


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2, stage=1, micro=4, precision="bf16"), Layout(data=2, micro=4, precision="fp16", stage=2)]
)
def test_half_precision_stays_near(crew: Any, plain: Any, layout: Layout) -> None:
    for losses, found, _ in crew(2)(train, run_of(layout, "single"), "single", None):
        assert losses == pytest.approx(plain[0], rel=3e-2)  # bf16 carries 8 bits
        assert found.loss == pytest.approx(plain[1].loss, rel=5e-2)


@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=2, micro=4), pytest.param(Layout(tensor=2, data=2, stage=3, micro=2), marks=pytest.mark.long)],
    ids=str,
)
def test_dropout_is_the_same_in_every_layout(crew: Any, plain: Any, layout: Layout) -> None:
    model = {"dropout": 0.1, "layerdrop": 0.2}
    (dropped, _, _), *_ = crew(1)(train, run_of(Layout(micro=8), "single", model=model), "single", None)
    assert dropped != pytest.approx(plain[0], rel=1e-3)
    for losses, _, _ in crew(layout.world)(train, run_of(layout, "single", model=model), "single", None):
        assert losses == pytest.approx(dropped, rel=1e-5)


def test_prompts_are_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.prompts=\['Once'\]: a classifier"):
        Run(task=TaskConfig(name=Task.classify), evaluation=EvaluationConfig(every=1, prompts=["Once"]))


def write_examples(path: Path, number: int, seed: int) -> Path:
    chosen = random.Random(seed)
    rows = []
    for each in range(number):
        label = chosen.choice(list(WORDS))
        text = f"Film {each} was " + " ".join(chosen.choices(WORDS[label], k=chosen.randint(1, 6)))
        rows.append(json.dumps({"text": text, "label": label}) + "\n")
    path.write_text("".join(rows))
    return path


def validation_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "validation"]


@pytest.fixture(scope="module")
def adapted(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A run from a language model at tensor 2 to step 2 of 4, continued at ZeRO-0 and exported; its folder, arguments,
    and what both said."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("classifier")
    texts = [" ".join(words) for words in WORDS.values()] + ["Film 0123456789 was"]
    save_tokenizer(train_tokenizer(texts, 300), folder / "language")
    torch.manual_seed(1)
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    OPTForCausalLM(OPTConfig(**shape, max_position_embeddings=32)).save_pretrained(folder / "language")
    train_file, held_out = write_examples(folder / "train.jsonl", 60, 1), write_examples(folder / "held.jsonl", 13, 2)
    arguments = [
        "task=classify", f"init_from={folder / 'language'}", f"data.train={train_file}", f"data.validation={held_out}",
        "precision=fp32", "data.sequence_length=16", "batch.global=8", "batch.micro=8", "steps=4", "evaluation.every=2",
        "logging.wandb=disabled", "logging.tensorboard=false", "schedule.warmup_steps=0", "optimizer.lr=3e-3",
        f"data.cache={folder / 'cache'}", f"run.dir={folder / 'run'}", "export.at_end=true",
    ]  # fmt: skip
    first = trained(crew(2), *arguments, "parallel.tensor=2", "stop_at=2")
    assert first.returncode == 0, first.stderr
    second = trained(crew(1), *arguments, "zero.stage=0")
    assert second.returncode == 0, second.stderr
    return folder, arguments, first.stdout + second.stdout


def test_from_a_language_model_to_an_export_in_two_layouts(adapted: tuple[Path, list[str], str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, _, said = adapted
    assert "has no classification head: a new head for 2 labels is trained" in said
    assert "continuing at step 2" in said
    assert "validation at step 4: loss" in said
    assert ", accuracy " in said
    assert (folder / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((folder / "run" / "checkpoints" / "step-4" / "manifest.json").read_text())
    assert manifest["labels"] == {"names": ["bad", "good"], "problem_type": "single_label_classification"}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "export")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.label2id == {"bad": 0, "good": 1}
    assert model.config.problem_type == "single_label_classification"
    rows = [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True, truncation=True, max_length=64)
    assert inputs.input_ids.size(1) <= 16  # or we had cut
    with torch.no_grad():
        output = model.eval()(inputs.input_ids, inputs.attention_mask, labels=labels)
    last = validation_rows(folder / "run")[-1]
    assert last["step"] == 4
    assert "perplexity" not in last
    assert last["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    confusion = np.zeros((2, 2))
    np.add.at(confusion, (labels.numpy(), output.logits.argmax(dim=1).numpy()), 1)
    assert last["accuracy"] == pytest.approx(confusion.trace() / 13)
    card = (folder / "run" / "export" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "`bad`, `good` (single_label_classification)" in card


def test_ours_and_the_export_open_alike_and_verify(adapted: tuple[Path, list[str], str]) -> None:
    from opt_parallel import OPTForSequenceClassification
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.tools.verify import verify

    checkpoint, exported = adapted[0] / "run" / "checkpoints" / "step-4", adapted[0] / "run" / "export"
    ours, theirs = (OPTForSequenceClassification.from_pretrained(each) for each in (checkpoint, exported))
    assert ours.config.labels() == theirs.config.labels() == open_checkpoint(checkpoint).labels
    assert ours.config.id2label == {0: "bad", 1: "good"}
    ids = torch.randint(4, 300, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    verdict = verify(exported, against=checkpoint)
    assert verdict is not None
    assert verdict.agrees
    with pytest.raises(UserError, match=r"step-4 is a classifier \(score.weight is unexpected\), not a language model"):
        open_checkpoint(checkpoint).check_language_model()


def test_other_labels_do_not_continue_a_run(crew: Any, adapted: tuple[Path, list[str], str], tmp_path: Path) -> None:
    folder, arguments, _ = adapted
    relabelled = tmp_path / "relabelled.jsonl"
    relabelled.write_text((folder / "train.jsonl").read_text().replace('"bad"', '"poor"'))
    process = trained(crew(1), *arguments, f"data.train={relabelled}", "data.validation=null", "evaluation.every=0",
                      "steps=9")  # fmt: skip
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert (
        "is a classifier of bad, good (single_label_classification), but this run trains a classifier of good, poor"
        in line
    )
    checkpoint = folder / "run" / "checkpoints" / "step-4"
    process = trained(crew(1), *arguments, f"init_from={checkpoint}", "task.labels=[good,bad]", "steps=9")
    assert process.returncode == 2
    assert "task.labels=['good', 'bad'], but the classifier of init_from=" in process.stderr
