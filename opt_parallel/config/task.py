"""Configuration of the task (pretraining, fine-tuning on prompts, classification) and of LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from opt_parallel.config.model import ProblemType, Section, require

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # Hugging Face's names of linear layers


class Task(Enum):
    """The task of a run. Other modules test the properties of a task and not its name. `data/kinds.py` defines each
    task's encoder and samples."""

    pretrain = "pretrain"
    finetune = "finetune"
    classify = "classify"

    @property
    def plain_text(self) -> bool:
        """Whether a record is a single text. Only records that are a single text can be streamed, built by a template,
        and used to train a tokenizer."""
        return self is Task.pretrain

    @property
    def has_chats(self) -> bool:
        """Whether a record may be a list of chat messages."""
        return self is Task.finetune

    @property
    def classifies(self) -> bool:
        """Whether the network scores labels instead of predicting tokens."""
        return self is Task.classify

    @property
    def unit(self) -> str:
        """The name of what the loss is averaged over, a token or an example."""
        return "example" if self.classifies else "token"


class Truncation(Enum):
    """The end that is kept of a prompt, or of a text to classify, that is too long. A completion that is too long even
    without its prompt is cut at its end."""

    keep_end = "keep_end"
    keep_start = "keep_start"


@dataclass
class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021). All weights are frozen, and the layers in `targets` compute (W + alpha /
    rank · B A) x with trained matrices B and A. With `rank=0` there is no LoRA, and every parameter is trained."""

    # rank of the trained matrices A and B; 0: train every parameter
    rank: int = 0
    # the product B A is scaled by alpha / rank
    alpha: float = 16.0
    # linear layers that are adapted: q_proj, k_proj, v_proj, out_proj, fc1, fc2
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def check(self) -> None:
        require(self.rank >= 0, f"task.lora.rank={self.rank} must not be negative (0: train every parameter)")
        require(self.alpha > 0, f"task.lora.alpha={self.alpha} must be positive")
        require(bool(self.targets), f"task.lora.targets is empty: choose among {', '.join(LORA_TARGETS)}")
        for name in self.targets:
            require(
                name in LORA_TARGETS,
                f"task.lora.targets={list(self.targets)}: no layer {name}; choose among {', '.join(LORA_TARGETS)}",
            )
        require(
            len(set(self.targets)) == len(self.targets),
            f"task.lora.targets={list(self.targets)} names a layer twice: remove one",
        )


@dataclass
class TaskConfig(Section):
    """The task and the fields of its records.

    `pretrain` reads `data.text_field` or `data.template`, and the loss covers all tokens. `finetune` reads
    `prompt_field` and `completion_field`, or chat messages in `messages_field`, and the loss covers completions.
    `classify` reads `data.text_field`, optionally `pair_field`, and a label in `label_field`."""

    # pretrain: loss on all tokens; finetune: loss on completions; classify: a label for a text
    name: Task = Task.pretrain
    # finetune: the record's field with the prompt
    prompt_field: str = "prompt"
    # finetune: the record's field with the completion
    completion_field: str = "completion"
    # finetune: the record's field with the messages of a chat, in records without a prompt
    messages_field: str = "messages"
    # finetune: pack several examples into a row, without attention between them; false: one padded example per row
    packing: bool = True
    # which end of a prompt or text is kept if it is too long
    truncation: Truncation = Truncation.keep_end
    # classify: the record's field with a second text; null: no second text
    pair_field: str | None = None
    # classify: the record's field with the label, which is a name, a list of names, or a number
    label_field: str = "label"
    # classify: names of the labels in the order of the scores; null: the sorted labels of the training data
    labels: list[Any] | None = None
    # classify: the kind of labels; null: inferred from the training data
    problem_type: ProblemType | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        for label in self.labels or []:
            fits = isinstance(label, (str, bool, int, float))
            require(fits, f"task.labels={self.labels}: {label} is not the name of a label: put it in quotes")
        self.labels = None if self.labels is None else [name_of(label) for label in self.labels]
        super().__post_init__()

    @property
    def cuts_rows(self) -> bool:
        """Whether samples are rows of equal length, cut from concatenated texts."""
        return self.name.plain_text or (self.packing and not self.name.classifies)

    def check(self) -> None:
        require(
            self.labels is None or len(set(self.labels)) == len(self.labels) > 0,
            f"task.labels={self.labels and list(self.labels)} must name each label once",
        )


def name_of(label: Any) -> str:
    """The name of a label. A boolean is spelled as in JSON."""
    return str(label).lower() if isinstance(label, bool) else str(label)
