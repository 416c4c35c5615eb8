"""Synthetic examples for classifiers, and a small run on these examples, with the engine and with transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layouts import Layout, rate_at, run_for, weights_of

from opt_parallel.config.model import Labels, ProblemType
from opt_parallel.config.run import OptimizerConfig, Run
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.data.samples.batches import Feed
from opt_parallel.data.samples.mixture import Mixture, Source
from opt_parallel.data.samples.order import Shuffled
from opt_parallel.data.samples.samples import Sample
from opt_parallel.runtime.clock import Clock

PROBLEMS = {
    "single": Labels(("no", "maybe", "yes"), ProblemType.single_label_classification),
    "multi": Labels(("new", "hot", "big"), ProblemType.multi_label_classification),
    "regression": Labels(("LABEL_0",), ProblemType.regression),
}
LAYERS = 2
NO_DROPOUT = {"dropout": 0.0, "layerdrop": 0.0}
HELD_OUT = 7  # the number of validation examples, which is not a multiple of the batch


@dataclasses.dataclass(frozen=True)
class Examples:
    """`size` examples of 1 to 16 tokens, each a pure function of its index."""

    problem: str
    size: int
    first: int = 0

    def __len__(self) -> int:
        return self.size

    def sample(self, number: int) -> Sample:
        generator = np.random.default_rng(self.first + number)
        ids = np.concatenate([[2], generator.integers(4, 515, generator.integers(0, 16))])
        if self.problem == "single":
            return Sample(ids, np.array(generator.integers(3)))
        values = generator.normal(size=1) if self.problem == "regression" else generator.integers(2, size=3)
        return Sample(ids, values.astype(np.float32))


def run_of(layout: Layout, problem: str, steps: int = 3, model: dict[str, Any] | None = None) -> Run:
    labels = PROBLEMS[problem]
    task = TaskConfig(name=Task.classify, labels=list(labels.names), problem_type=labels.problem_type)
    optimizer = OptimizerConfig(lr=1e-2, clip=0.5, eps=1e-6, weight_decay=0.0)
    return dataclasses.replace(
        run_for(layout, {"num_hidden_layers": LAYERS, **(model or NO_DROPOUT)}, steps), task=task, optimizer=optimizer
    )


def feed_for(run: Run, problem: str, data_rank: int = 0, data_size: int = 1) -> Feed:
    samples = Examples(problem, 32)
    mixture = Mixture([Source("train", 1, samples, Shuffled(run.seed, len(samples)))])
    return Feed(mixture, run.global_batch, run.micro_batch, data_rank, data_size)


def train(run: Run, problem: str, folder: str | None) -> tuple[list[float], Any, dict[str, Any]]:
    """Train a classifier from the weights in `folder` or from random weights, on each worker process.

    The result is the losses, the validation result, and this rank's part of every weight."""
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.validation import validate

    labels = PROBLEMS[problem]
    with Topology.open(run.parallel.tensor) as topology:
        source = open_checkpoint(folder).weights if folder else random_source(run.seed)
        engine = Engine.build(run, topology, source, labels)
        feed = feed_for(run, problem, topology.data.rank, topology.data.size)
        losses = [float(engine.step(feed.at(step * run.global_batch), Clock(step)).loss) for step in range(run.steps)]
        found = validate(engine, Examples(problem, HELD_OUT, 100), labels)
        weights = weights_of(engine)
        engine.close()
    return losses, found, weights


def their_model(problem: str, folder: Path) -> Any:
    """Save a small OPTForSequenceClassification of transformers in `folder`, and return the model."""
    from transformers import OPTConfig, OPTForSequenceClassification

    labels = PROBLEMS[problem]
    torch.manual_seed(3)
    assert labels.problem_type is not None
    config = OPTConfig(
        vocab_size=515, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, ffn_dim=256, dropout=0.0,
        max_position_embeddings=64, init_std=0.08, num_labels=len(labels.names), problem_type=labels.problem_type.value,
        id2label=dict(enumerate(labels.names)), label2id={name: n for n, name in enumerate(labels.names)},
    )  # fmt: skip
    model = OPTForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


def train_theirs(model: Any, run: Run, problem: str) -> list[float]:
    """The losses of the same training steps with transformers and torch's AdamW, in one process."""

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    whole = dataclasses.replace(run, batch={"global": run.global_batch, "micro": run.global_batch})
    feed, losses = feed_for(whole, problem), []
    for step in range(run.steps):
        (batch,) = feed.at(step * run.global_batch)
        loss = model(batch.ids, (batch.segments > 0).long(), labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run, Clock(step + 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
