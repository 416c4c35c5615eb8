"""Fine-tuning: packed is padded, the loss is the mean over all that is to be learnt, and train.py brings it about."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import SMALL, python
from finetuning import encode, examples_of, some_records, tokenizer
from hugging_face import random_model
from layouts import Layout, run_for
from torch import Tensor
from torch.nn import functional as F
from training import trained

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.data.encode.chat import chat_template
from opt_parallel.data.encode.tokenizer import save_tokenizer
from opt_parallel.data.prepare import prepare
from opt_parallel.data.samples.samples import Batch, collate
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.shard import fill, random_source
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.clock import Clock

PAD = 1
LENGTH = 48
MODEL = {"layerdrop": 0.0, "dropout": 0.0}
# the same sums in another order
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def batch_of(folder: Path, packing: bool, records: Sequence[Any] = tuple(some_records())) -> Batch:
    """All examples as one batch."""
    rows = examples_of(folder, records, LENGTH, packing)
    return collate([rows.sample(number) for number in range(len(rows))], range(len(rows)), PAD)


def loss_and_gradients(model: CausalLM, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch.ids, batch.labels, batch.positions, batch.segments) / batch.targets
    loss.backward()
    return loss.item(), {name: tensor.grad.clone() for name, tensor in model.named_parameters()}


def a_model(dtype: torch.dtype = torch.float64) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(run_for(Layout(), MODEL).model, ALONE)
    fill(model, random_source(1), torch.device("cpu"), dtype)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_is_padded(tmp_path: Path, dtype: torch.dtype) -> None:
    packed, padded = batch_of(tmp_path / "a", packing=True), batch_of(tmp_path / "b", packing=False)
    assert len(packed.ids) < len(padded.ids)
    assert packed.targets == padded.targets
    assert packed.tokens == padded.tokens
    model = a_model(dtype)
    loss, gradients = loss_and_gradients(model, packed)
    expected_loss, expected = loss_and_gradients(model, padded)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype])
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm()) <= TOLERANCE[dtype] * scale, name


def test_only_completions_count(tmp_path: Path) -> None:
    """Whatever stands as a label over a prompt: the mean of the losses at the tokens that are to be learnt."""
    records = some_records()
    batch, model = batch_of(tmp_path, packing=False), a_model()
    loss, gradients = loss_and_gradients(model, batch)
    losses: list[Tensor] = []
    cuts = encode(records, LENGTH).columns["lengths"].cumsum()[:-1].tolist()
    ids, targets = (
        torch.from_numpy(encode(records, LENGTH).columns[name]).long().tensor_split(cuts) for name in ("ids", "targets")
    )
    model.zero_grad()
    for example, learnt in zip(ids, targets, strict=True):
        scores = model(example[None, :-1])[0]
        prompts = torch.randint(0, 300, (len(learnt) - 1,))  # anything
        labels = torch.where(learnt[1:] == 1, example[1:], prompts)
        losses += F.cross_entropy(scores, labels, reduction="none")[learnt[1:] == 1]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-12)
    for name, tensor in model.named_parameters():
        assert torch.allclose(gradients[name], tensor.grad, rtol=0, atol=1e-13), name


def test_transformers_agrees(tmp_path: Path) -> None:
    shape = {"vocab_size": 300, "max_position_embeddings": LENGTH, "dropout": 0.0, "attention_dropout": 0.0}
    theirs = random_model(shape)
    theirs.save_pretrained(tmp_path / "model")
    theirs.double()
    model = open_checkpoint(tmp_path / "model").model(ALONE, torch.device("cpu"), torch.float64)
    loss, _ = loss_and_gradients(model, batch_of(tmp_path, packing=True))
    encoded = encode(some_records(), LENGTH)
    cuts = encoded.columns["lengths"].cumsum()[:-1].tolist()
    ids, targets = (torch.from_numpy(encoded.columns[name]).long().tensor_split(cuts) for name in ("ids", "targets"))
    pad = torch.nn.utils.rnn.pad_sequence
    labels = [torch.where(learnt == 1, example, -100) for example, learnt in zip(ids, targets, strict=True)]
    output = theirs(
        pad(list(ids), batch_first=True, padding_value=PAD),
        attention_mask=pad([torch.ones_like(example) for example in ids], batch_first=True),
        labels=pad(labels, batch_first=True, padding_value=-100),
    )
    assert loss == pytest.approx(output.loss.item(), rel=1e-6)  # they take logits to float32 for it
    shifted = F.cross_entropy(output.logits[:, :-1].mT, pad(labels, batch_first=True, padding_value=-100)[:, 1:])
    assert loss == pytest.approx(shifted.item(), rel=1e-12)


# long and short completions in turn, so that of two data ranks one has all the long ones
UNEVEN = [
    {"prompt": "the cat", "completion": (" sat on the mat and saw another cat, a dog", " 3")[number % 2]}
    for number in range(8)
]


def step_and_evaluate(run: Any, folder: str) -> tuple[float, float, float, int]:
    """On the crew: the loss and norm of a step whose samples are all rows in order, the validation loss, targets."""
    from opt_parallel.data.samples.packing import Examples
    from opt_parallel.data.store.store import TokenStore
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.validation import validate

    rows = Examples(TokenStore(folder), run.data.sequence_length, run.task.packing)
    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        before = validate(engine, rows, None).loss
        data, micro = topology.data, run.micro_batch
        firsts = range(data.rank * micro, len(rows), data.size * micro)
        batches = [
            collate([rows.sample(n) for n in range(first, first + micro)], range(first, first + micro), PAD)
            for first in firsts
        ]
        result = engine.step(batches, Clock())
        engine.close()
    return float(result.loss), float(result.grad_norm), before, sum(batch.targets for batch in batches)


@pytest.mark.parametrize(
    ("layout", "packing"),
    [
        (Layout(2, 1, 1, 1), True),
        (Layout(1, 2, 3, 1), False),
        pytest.param(Layout(1, 2, 3, 1), True, marks=pytest.mark.long),
        pytest.param(Layout(2, 2, 1, 1), True, marks=pytest.mark.long),
        pytest.param(Layout(2, 2, 1, 1), False, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_loss_is_one_mean_over_all_ranks(crew: Any, tmp_path: Path, layout: Layout, packing: bool) -> None:
    plain = run_for(layout, MODEL)
    rows = examples_of(tmp_path, UNEVEN, LENGTH, packing)
    run = dataclasses.replace(
        plain,
        task=dataclasses.replace(plain.task, packing=packing),
        data=dataclasses.replace(plain.data, sequence_length=LENGTH),
        batch={"global": len(rows), "micro": 1},
    )
    answers = crew(layout.world)(step_and_evaluate, run, str(tmp_path))
    model = a_model(torch.float32)
    loss, gradients = loss_and_gradients(model, batch_of(tmp_path / "plain", packing=False, records=UNEVEN))
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    if not packing:
        assert len({targets for *_, targets in answers}) == 2, "the ranks must have different numbers of targets"
    for found, found_norm, before, _ in answers:
        assert found == pytest.approx(loss, rel=1e-5)
        assert before == pytest.approx(loss, rel=1e-5)
        assert found_norm == pytest.approx(norm, rel=1e-5)


CHATS = [
    {"messages": [{"role": "user", "content": f"the {word}"}, {"role": "assistant", "content": answer}]}
    for word, answer in [("cat", "sat"), ("dog", "then said hello"), ("mat", "3 birds")]
]
PAIRS = [{"prompt": f"another {word}", "completion": " " + answer} for word, answer in [("dog", "on"), ("cat", "mat")]]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model({"vocab_size": 300, "max_position_embeddings": 64}).save_pretrained(folder)
    save_tokenizer(tokenizer(), folder)
    return folder


def test_the_chat_template_goes_with_chats(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one cache, too, and over a template that the tokenizer brings, which is said."""

    def prepared(name: str, records: list[Any], brought: Path) -> Path:
        data = DataConfig(
            train=str(write(tmp_path / name, records)), tokenizer=str(brought), sequence_length=64,
            cache=str(tmp_path / "cache"),
        )  # fmt: skip
        return prepare(Run(model=run_for(Layout()).model, task=TaskConfig(name=Task.finetune), data=data)).tokenizer

    template = chat_template(tokenizer(), 2)
    assert not (prepared("pairs.jsonl", PAIRS, checkpoint) / "chat_template.jinja").exists()
    assert (prepared("chats.jsonl", CHATS, checkpoint) / "chat_template.jinja").read_text() == template
    assert "warning" not in capsys.readouterr().out
    save_tokenizer(tokenizer(), tmp_path / "brought", "another")
    assert (prepared("chats.jsonl", CHATS, tmp_path / "brought") / "chat_template.jinja").read_text() == template
    assert f"the chat template of data.tokenizer={tmp_path / 'brought'} is not used" in capsys.readouterr().out


def finetune(crew: Any, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = [each for each in SMALL if not each.startswith(("model=", "data.sequence_length", "steps"))]
    return trained(
        crew(1), "task=finetune", *settings, "data.sequence_length=64", f"data.cache={folder / 'cache'}",
        f"run.dir={folder / 'run'}", *arguments,
    )  # fmt: skip


def test_a_fine_tuned_model_answers(crew: Any, tmp_path: Path, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write(tmp_path / "chats.jsonl", [*CHATS, *PAIRS] * 4)
    done = finetune(
        crew, tmp_path, f"init_from={checkpoint}", f"data.train={data}", f"data.validation={data}",
        "steps=60", "batch.micro=4", "evaluation.every=30", "evaluation.prompts=['another dog']",
        "evaluation.max_new_tokens=8", "optimizer.lr=3e-3", "optimizer.weight_decay=0", "model.dropout=0",
        "export.at_end=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (examples,) = [line for line in done.stdout.splitlines() if line.startswith("data.train: 20 examples of ")]
    assert examples.endswith("% full")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["kind"] == "validation"][-1] < 0.05
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["text"] == " on"

    export = tmp_path / "run" / "export"
    assert (export / "chat_template.jinja").read_text() == chat_template(tokenizer(), 2)
    said = python("scripts/generate.py", "--checkpoint", str(export), "--prompt", "User: the dog\nAssistant:",
                  "--max-new-tokens", "30")  # fmt: skip
    assert said.stdout == "User: the dog\nAssistant: then said hello\n"
    model, words = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    asked = words.apply_chat_template(CHATS[2]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=9, do_sample=False)[0, asked["input_ids"].size(1) :]
    assert words.decode(answer) == " 3 birds</s>"


@pytest.mark.parametrize(
    ("records", "arguments", "words"),
    [
        ([PAIRS[0], {"prompt": "a", "completion": ""}], ["init_from={checkpoint}"], "line 2: 'completion' is empty"),
        (PAIRS, ["model=opt-tiny"], "task=finetune needs a tokenizer: start from a checkpoint, init_from="),
    ],
)
def test_mistakes_end_with_2(
    crew: Any, tmp_path: Path, checkpoint: Path, records: list[Any], arguments: list[str], words: str
) -> None:
    data = write(tmp_path / "data.jsonl", records)
    filled = [argument.format(checkpoint=checkpoint) for argument in arguments]
    failed = finetune(crew, tmp_path, f"data.train={data}", *filled)
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: ")
    assert words in failed.stderr
