"""What a run trains: pretraining, fine-tuning on prompts, classification; all of the network or low-rank additions."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from opt_parallel.shapes import ProblemType, Section, require

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # Hugging Face's names of OPT's linears


class Task(Enum):
    pretrain = "pretrain"
    finetune = "finetune"
    classify = "classify"


class Truncation(Enum):
    """Which end of an example's prompt, or of a text to classify, goes where it is too long: `keep_end` cuts its
    beginning, `keep_start` its end. A completion that is too long even without its prompt is cut at its end."""

    keep_end = "keep_end"
    keep_start = "keep_start"


@dataclass
class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021): the weights W of `targets` are frozen like all others, and
    `alpha` / `rank` · B A is trained beside them. `rank=0`: every parameter is trained."""

    rank: int = 0
    alpha: float = 16.0
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

    name: Task = Task.pretrain
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    packing: bool = True
    truncation: Truncation = Truncation.keep_end
    pair_field: str | None = None
    label_field: str = "label"
    labels: list[Any] | None = None  # of texts once made; typed so that true is not yet True
    problem_type: ProblemType | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        for label in self.labels or []:
            fits = isinstance(label, (str, bool, int, float))
            require(fits, f"task.labels={self.labels}: {label} is no name of a label: put it in quotes")
        self.labels = None if self.labels is None else [name_of(label) for label in self.labels]
        super().__post_init__()

    def check(self) -> None:
        require(
            self.labels is None or len(set(self.labels)) == len(self.labels) > 0,
            f"task.labels={self.labels and list(self.labels)} must name each label once",
        )


def name_of(label: Any) -> str:
    """A label as it is named; true and false as JSON writes them."""
    return str(label).lower() if isinstance(label, bool) else str(label)
