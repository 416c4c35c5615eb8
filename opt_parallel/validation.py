"""Validation on held-out text, with the loss, the metrics of a classifier, and samples of generated text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from opt_parallel.config.model import Labels, ProblemType
from opt_parallel.config.run import Run
from opt_parallel.data.encode.tokenizer import decode_continuation, encode_prompt, load_tokenizer
from opt_parallel.data.samples.batches import read_together, validation_batches
from opt_parallel.data.samples.samples import Batch, Samples
from opt_parallel.engine import Engine
from opt_parallel.model.decoding import Decoding, check_fits
from opt_parallel.model.generation import generate, left_padded
from opt_parallel.model.heads import example_losses
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.random import number
from opt_parallel.parallel.topology import Topology
from opt_parallel.report.scores import figures, tally
from opt_parallel.runtime.errors import UserError

TEMPERATURE, TOP_P = 0.8, 0.95  # give varied samples without very unlikely tokens


class Evaluated(Protocol):
    """A network that can be validated, either an `Engine` or an `Untrained`."""

    run: Run
    topology: Topology

    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of the losses of this data rank's batch, computed without dropout."""
        ...

    def scores(self, batch: Batch) -> Tensor:
        """The scores (B, N) of a classifier, computed without dropout."""
        ...


@dataclass
class Untrained:
    """A network in evaluation mode, without an optimizer."""

    run: Run
    topology: Topology
    model: nn.Module

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        batch = batch.to(self.topology.device)
        return self.model(batch.ids, batch.labels, batch.positions, batch.segments)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        batch = batch.to(self.topology.device)
        return self.model(batch.ids, None, batch.positions, batch.segments)


@dataclass(frozen=True)
class Validation:
    """The result of a validation. `loss` is the mean over the `targets` of all data ranks, in nats per token for a
    language model. A classifier also has metrics in `figures` (see `report.scores`) and, if each example has one label,
    a `confusion` matrix (N, N) whose rows are the true labels."""

    loss: float
    targets: int
    figures: dict[str, float] = field(default_factory=dict)
    confusion: np.ndarray | None = None


def validate(evaluated: Evaluated, samples: Samples, labels: Labels | None = None) -> Validation:
    """Evaluate each sample once, in parallel on all data ranks. `labels` are the labels of a classifier.

    Raises: Unread, on every rank, if one rank cannot read a sample."""
    run, data = evaluated.run, evaluated.topology.data
    total, targets = torch.zeros((), device=evaluated.topology.device, dtype=torch.float64), 0
    tallied = np.zeros(1)
    batches = validation_batches(samples, run.micro_batch, data.rank, data.size, run.model.pad_token_id)
    for batch in read_together(batches, evaluated.topology):
        targets += batch.targets
        if labels is None:
            total += evaluated.evaluate(batch)
            continue
        assert labels.problem_type is not None
        scores = evaluated.scores(batch)
        total += example_losses(scores, batch.labels.to(scores.device), labels.problem_type).sum()
        counts = batch.counting
        tallied = tallied + tally(
            scores[counts].float().cpu().numpy(), batch.labels[counts].numpy(), labels.problem_type
        )
    targets = evaluated.topology.sum(targets, data)
    loss = float(all_reduce(total, data)) / targets
    if labels is None or labels.problem_type is None:
        return Validation(loss, targets)
    total_tally = all_reduce(torch.from_numpy(tallied), data).numpy()
    single = labels.problem_type is ProblemType.single_label_classification
    return Validation(loss, targets, figures(total_tally, labels.problem_type), total_tally if single else None)


@dataclass(frozen=True)
class Prompts:
    """The run's `evaluation.prompts` as token ids, with their tokenizer."""

    tokenizer: Tokenizer
    ids: list[list[int]]

    @classmethod
    def encode(cls, run: Run, tokenizer_folder: Path) -> Prompts:
        """Encode the prompts. Raises: UserError for a prompt so long that no positions are left for new tokens."""
        tokenizer = load_tokenizer(str(tokenizer_folder))
        ids = [
            encode_prompt(tokenizer, prompt, run.model, run.data.special_tokens) for prompt in run.evaluation.prompts
        ]
        for prompt, encoded in zip(run.evaluation.prompts, ids, strict=True):
            try:
                check_fits(run.model, _decoding(run.evaluation.max_new_tokens, run.seed, step=0), len(encoded))
            except UserError as error:
                raise UserError(f"evaluation.prompts: {prompt!r}: {error}") from error
        return cls(tokenizer, ids)

    def texts(self, engine: Engine, step: int) -> list[str]:
        """A continuation of each prompt by the model at `step`. All ranks must call this method, and all get the same
        texts."""
        run, topology = engine.run, engine.topology
        ids, mask = left_padded(self.ids, run.model.pad_token_id, topology.device)
        engine.wrapped.eval()
        # Under ZeRO-3 each forward gathers weights from all ranks, so all ranks must run the same number of forwards.
        # Hence the world group.
        decoding = _decoding(run.evaluation.max_new_tokens, run.seed, step)
        output = generate(engine.wrapped.module, ids, mask, decoding, topology.world)
        starts = [ids.size(1) - len(prompt) for prompt in self.ids]
        return [
            decode_continuation(self.tokenizer, row[start:], len(prompt))
            for row, start, prompt in zip(output.tolist(), starts, self.ids, strict=True)
        ]


def _decoding(max_new_tokens: int, seed: int, step: int) -> Decoding:
    return Decoding(max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=number("samples", seed, step))
