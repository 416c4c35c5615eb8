"""The tasks: how each one encodes records to token ids, and cuts token ids into samples.

To add a task: a class here, an entry in `KINDS`, its properties in `config/task.py`. `model/build.py` builds a
classifier for a run that has labels."""

from __future__ import annotations

from typing import Protocol

from tokenizers import Tokenizer

from opt_parallel.config.model import Labels, require
from opt_parallel.config.run import Run
from opt_parallel.config.task import Task
from opt_parallel.data.encode.classify import LabelledEncoder
from opt_parallel.data.encode.finetune import ExampleEncoder
from opt_parallel.data.encode.pretrain import Encoder, TextEncoder
from opt_parallel.data.encode.tokenizer import check_padding
from opt_parallel.data.samples.packing import Examples
from opt_parallel.data.samples.samples import Labelled, Rows, Samples
from opt_parallel.data.store.store import TokenStore
from opt_parallel.data.text.records import Text
from opt_parallel.runtime.log import say


class Kind(Protocol):
    """`labels`: a classifier's; None for a language model."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        """The encoder from the task's records to token ids. Raises: UserError."""
        ...

    def samples(self, run: Run, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        """The samples of a store; `key` names the store in messages. Raises: UserError if there are none."""
        ...


class Pretraining:
    """Concatenated documents, cut into rows."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        return TextEncoder(tokenizer, run.model.eos_token_id, text, run.data.special_tokens)

    def samples(self, run: Run, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        length = run.data.sequence_length
        rows = Rows(store, length)
        require(
            len(rows) > 0,
            f"{key}: {store.tokens} tokens do not fill one row: data.sequence_length={length} needs {length + 1}; "
            "add text or shorten the sequence",
        )
        return rows


class Finetuning:
    """Prompts and completions, packed into rows or one per row; only completions are targets."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        length, spelled = run.data.sequence_length, run.data.special_tokens
        return ExampleEncoder(tokenizer, run.model.eos_token_id, run.task, length, spelled)

    def samples(self, run: Run, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        examples = Examples(store, run.data.sequence_length, run.task.packing)
        say(f"{key}: {examples.summary()}")
        return examples


class Classification:
    """Texts with labels, one per row."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        assert labels is not None
        check_padding(tokenizer, run.model)
        length, spelled = run.data.sequence_length, run.data.special_tokens
        return LabelledEncoder(tokenizer, run.model.eos_token_id, text.field, run.task, labels, length, spelled)

    def samples(self, run: Run, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        return Labelled(store, len(labels.names) if labels else None)


KINDS: dict[Task, Kind] = {
    Task.pretrain: Pretraining(),
    Task.finetune: Finetuning(),
    Task.classify: Classification(),
}
