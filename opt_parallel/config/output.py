"""What a run writes: validation, checkpoints, exports, logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from opt_parallel.config.model import Section, require
from opt_parallel.config.units import bytes_of


class ExportDtype(Enum):
    """`auto`: the checkpoint's own, float32 for one that was trained here."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Wandb(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class EvaluationConfig(Section):
    """`every`: steps between two validations, and one at the end; 0: never. At each, the model continues `prompts`."""

    # steps between two validations, and one at the end; 0: never
    every: int = 0
    # texts that the model continues at each validation, into samples.jsonl
    prompts: list[str] = field(default_factory=list)
    # tokens of a continuation
    max_new_tokens: int = 64

    def check(self) -> None:
        require(self.every >= 0, f"evaluation.every={self.every} must not be negative (0: never)")
        require(self.max_new_tokens >= 1, f"evaluation.max_new_tokens={self.max_new_tokens} must be at least 1")
        require(
            not self.prompts or self.every > 0,
            f"evaluation.prompts={list(self.prompts)} are continued at each evaluation, but evaluation.every=0: "
            "set how many steps lie between two",
        )


@dataclass
class CheckpointConfig(Section):
    """`every`: steps between two checkpoints, besides the one at the end; 0: only that. `keep`: newest to keep;
    `keep_every`: keep those at a multiple of so many steps too; 0: none. `keep_best`: save one at each evaluation whose
    validation loss is the lowest so far, and keep it. `asynchronous`: train on while they are written."""

    # steps between two checkpoints, besides the one at the end; 0: only that one
    every: int = 0
    # newest checkpoints to keep
    keep: int = 2
    # keep those at a multiple of so many steps too; 0: none
    keep_every: int = 0
    # save and keep the checkpoint with the lowest validation loss
    keep_best: bool = False
    # train on while a checkpoint is written
    asynchronous: bool = True

    def check(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every} must not be negative (0: only at the end)")
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")
        require(self.keep_every >= 0, f"checkpoint.keep_every={self.keep_every} must not be negative (0: none)")


@dataclass
class ExportConfig(Section):
    """`at_end`: write the finished run's last checkpoint as a Hugging Face folder, `run.dir`/export."""

    # write the finished run's last checkpoint as a Hugging Face folder, run.dir/export
    at_end: bool = False
    # of the exported weights
    dtype: ExportDtype = ExportDtype.auto
    # largest weights file, such as 5GB or 500MiB
    max_shard_size: str = "5GB"

    def check(self) -> None:
        bytes_of(self.max_shard_size, "export.max_shard_size=")


@dataclass
class LoggingConfig(Section):
    # offline: files in run.dir; online: sent to wandb
    wandb: Wandb = Wandb.offline
    # write TensorBoard's files to run.dir
    tensorboard: bool = True
    # TFLOP/s of one device, for mfu and hfu where our table lacks the device
    peak_tflops: float | None = None

    def check(self) -> None:
        require(
            self.peak_tflops is None or self.peak_tflops > 0, f"logging.peak_tflops={self.peak_tflops} must be positive"
        )
