"""Defines how each task encodes text records to token ids, and how it cuts token ids into samples.

A new task needs a class in this module, an entry in `KINDS`, and its properties in `config/task.py`. `model/build.py`
builds a classifier for a run that has labels."""

from __future__ import annotations

from typing import Protocol

from tokenizers import Tokenizer

from opt_parallel.config.model import Labels, require
from opt_parallel.config.run import Run
from opt_parallel.config.task import Task, TaskConfig
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
    """The methods of a task. `labels` are the labels of a classifier, and None for a language model."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        """The encoder from the task's records to token ids. Raises: UserError."""
        ...

    def samples(self, task: TaskConfig, length: int, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        """The samples of a token store, which `key` names in messages. Raises: UserError if there are no samples."""
        ...


class Pretraining:
    """Pretraining on documents, which are concatenated and cut into rows of equal length."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        return TextEncoder(tokenizer, run.model.eos_token_id, text, run.data.special_tokens)

    def samples(self, task: TaskConfig, length: int, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        rows = Rows(store, length)
        require(
            len(rows) > 0,
            f"{key}: {store.tokens} tokens do not fill one row: data.sequence_length={length} needs {length + 1}; "
            "add text or shorten the sequence",
        )
        return rows


class Finetuning:
    """Fine-tuning on prompts and completions. Only the tokens of completions are targets."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        length, spelled = run.data.sequence_length, run.data.special_tokens
        return ExampleEncoder(tokenizer, run.model.eos_token_id, run.task, length, spelled)

    def samples(self, task: TaskConfig, length: int, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        examples = Examples(store, length, task.packing)
        say(f"{key}: {examples.summary()}")
        return examples


class Classification:
    """Classification of texts with labels. Each row of a batch is one text."""

    def encoder(self, run: Run, tokenizer: Tokenizer, text: Text, labels: Labels | None) -> Encoder:
        assert labels is not None
        check_padding(tokenizer, run.model)
        length, spelled = run.data.sequence_length, run.data.special_tokens
        return LabelledEncoder(tokenizer, run.model.eos_token_id, text.field, run.task, labels, length, spelled)

    def samples(self, task: TaskConfig, length: int, store: TokenStore, key: str, labels: Labels | None) -> Samples:
        return Labelled(store, len(labels.names) if labels else None)


KINDS: dict[Task, Kind] = {
    Task.pretrain: Pretraining(),
    Task.finetune: Finetuning(),
    Task.classify: Classification(),
}
