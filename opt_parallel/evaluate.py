"""The loss on text that the run does not train on, and the texts that its model writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from opt_parallel.config import Run
from opt_parallel.data.batches import validation_batches
from opt_parallel.data.samples import Samples
from opt_parallel.data.tokens import decode_continuation, encode_prompt, load_tokenizer
from opt_parallel.engine import Engine
from opt_parallel.errors import UserError
from opt_parallel.model.decoding import Decoding, check_fits
from opt_parallel.model.generation import generate, left_padded
from opt_parallel.parallel.collectives import all_reduce
from opt_parallel.parallel.random import number

TEMPERATURE, TOP_P = 0.8, 0.95  # of the samples: varied, but without the words that a model gives next to no chance


def validation_loss(engine: Engine, samples: Samples) -> float:
    """Mean loss of all `samples`, in nats: one mean over the targets of all data ranks, not a mean of means."""
    run, topology = engine.run, engine.topology
    place = (topology.data.rank, topology.data.size)
    total, targets = torch.zeros((), device=topology.device, dtype=torch.float64), 0
    for batch in validation_batches(samples, run.micro_batch, *place, run.model.pad_token_id):
        total += engine.evaluate(batch)
        targets += batch.targets
    return float(all_reduce(total, topology.data)) / topology.sum(targets, topology.data)


@dataclass(frozen=True)
class Prompts:
    """The run's `evaluation.prompts` as token ids, and the tokenizer that made them."""

    tokenizer: Tokenizer
    ids: list[list[int]]

    @classmethod
    def encode(cls, run: Run, tokenizer_folder: Path) -> Prompts:
        """Raises: UserError for a prompt that leaves no room for its text."""
        tokenizer = load_tokenizer(str(tokenizer_folder))
        ids = [encode_prompt(tokenizer, prompt, run.model) for prompt in run.evaluation.prompts]
        for prompt, encoded in zip(run.evaluation.prompts, ids, strict=True):
            try:
                check_fits(run.model, _decoding(run, step=0), len(encoded))
            except UserError as error:
                raise UserError(f"evaluation.prompts: {prompt!r}: {error}") from error
        return cls(tokenizer, ids)

    def texts(self, engine: Engine, step: int) -> list[str]:
        """What the model makes of each prompt after `step` steps. Every rank takes part, and all get the same texts."""
        run, topology = engine.run, engine.topology
        ids, mask = left_padded(self.ids, run.model.pad_token_id, topology.device)
        engine.wrapped.eval()
        # under ZeRO-3 a forward gathers weights from all ranks, so all of them must take as many
        output = generate(engine.wrapped.module, ids, mask, _decoding(run, step), topology.world)
        starts = [ids.size(1) - len(prompt) for prompt in self.ids]
        return [
            decode_continuation(self.tokenizer, row[start:], len(prompt))
            for row, start, prompt in zip(output.tolist(), starts, self.ids, strict=True)
        ]


def _decoding(run: Run, step: int) -> Decoding:
    seed = number("samples", run.seed, step)
    return Decoding(run.evaluation.max_new_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=seed)
