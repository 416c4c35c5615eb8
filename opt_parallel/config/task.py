"""What a run trains: pretraining, fine-tuning on prompts, classification; all of the network or low-rank additions."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from opt_parallel.config.model import ProblemType, Section, require

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # Hugging Face's names of OPT's linears


class Task(Enum):
    """What a run trains. Code asks for a property, never for a name; `data/kinds.py` has each task's encoder and
    samples."""

    pretrain = "pretrain"
    finetune = "finetune"
    classify = "classify"

    @property
    def plain_text(self) -> bool:
        """A record is one text. So it may be streamed, filled in by a template, and train a tokenizer."""
        return self is Task.pretrain

    @property
    def has_chats(self) -> bool:
        """A record may be a list of messages."""
        return self is Task.finetune

    @property
    def classifies(self) -> bool:
        """An example has a label, and the network a score for each label. Else tokens are predicted."""
        return self is Task.classify

    @property
    def unit(self) -> str:
        """What the loss is a mean over."""
        return "example" if self.classifies else "token"


class Truncation(Enum):
    """Which end of an example's prompt, or of a text to classify, goes where it is too long: `keep_end` cuts its
    beginning, `keep_start` its end. A completion that is too long even without its prompt is cut at its end."""

    keep_end = "keep_end"
    keep_start = "keep_start"


@dataclass
class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021): the weights W of `targets` are frozen like all others, and
    `alpha` / `rank` · B A is trained beside them. `rank=0`: every parameter is trained."""

    # rank of the trained terms; 0: train every parameter
    rank: int = 0
    # the terms are scaled by alpha / rank
    alpha: float = 16.0
    # linear layers that get a term: q_proj, k_proj, v_proj, out_proj, fc1, fc2
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def check(self) -> None:
        require(self.rank >= 0, f"task.lora.rank={self.rank} must not be negative (0: train every parameter)")
        require(self.alpha > 0, f"task.lora.alpha={self.alpha} must be positive")
        require(bool(self.targets), f"task.lora.targets is empty: choose among {', '.join(LORA_TARGETS)}")
        for name in self.targets:
            require(
                name in LORA_TARGETS,
                f"task.lora.targets={list(self.targets)}: there is no {name}; choose among {', '.join(LORA_TARGETS)}",
            )
        require(
            len(set(self.targets)) == len(self.targets),
            f"task.lora.targets={list(self.targets)} names a layer twice: remove one",
        )


@dataclass
class TaskConfig(Section):
    """What is trained, and the fields that its records have.

    pretrain: `data.text_field` or `data.template`, all tokens count.
    finetune: `prompt_field` and `completion_field`, or a list of messages in `messages_field`; completions count.
    `packing`: several examples to a row, each seeing itself alone; else one a row, padded.
    classify: `data.text_field`, and a second text in `pair_field`; a label in `label_field`. `labels`: their names, in
    the order of the scores; null: those of the training data, sorted. `problem_type`: null: as the labels show."""

    # pretrain: all tokens count; finetune: completions count; classify: a label for a text
    name: Task = Task.pretrain
    # finetune: the field of a record that holds the prompt
    prompt_field: str = "prompt"
    # finetune: the field that holds the completion
    completion_field: str = "completion"
    # finetune: the field of a chat's messages, for records without a prompt
    messages_field: str = "messages"
    # finetune: several examples share a row, each sees itself alone; false: one a row, padded
    packing: bool = True
    # which end of a prompt or text is kept where it is too long
    truncation: Truncation = Truncation.keep_end
    # classify: the field of a second text; null: there is one text
    pair_field: str | None = None
    # classify: the field of the label: a name, a list of names, or a number
    label_field: str = "label"
    # classify: the labels' names in the order of the scores; null: those of the training data, sorted
    labels: list[Any] | None = None
    # classify: null: as the labels show
    problem_type: ProblemType | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        for label in self.labels or []:
            fits = isinstance(label, (str, bool, int, float))
            require(fits, f"task.labels={self.labels}: {label} is no name of a label: put it in quotes")
        self.labels = None if self.labels is None else [name_of(label) for label in self.labels]
        super().__post_init__()

    @property
    def cuts_rows(self) -> bool:
        """Samples are rows of equal length, cut from texts put end to end."""
        return self.name.plain_text or (self.packing and not self.name.classifies)

    def check(self) -> None:
        require(
            self.labels is None or len(set(self.labels)) == len(self.labels) > 0,
            f"task.labels={self.labels and list(self.labels)} must name each label once",
        )


def name_of(label: Any) -> str:
    """A label as it is named; true and false as JSON writes them."""
    return str(label).lower() if isinstance(label, bool) else str(label)
