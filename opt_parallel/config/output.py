"""Configuration of validation, checkpoints, export and logging."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from opt_parallel.config.model import Section, require
from opt_parallel.config.units import bytes_of


class ExportDtype(Enum):
    """Dtypes of exported weights. `auto` keeps the checkpoint's dtype, which is float32 for training checkpoints."""

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
    """Validation every `every` steps and at the end of the run. At each validation the model also continues the
    `prompts`."""

    # steps between two validations; the run also validates at its end; 0: never validate
    every: int = 0
    # texts that the model continues at each validation; written to samples.jsonl
    prompts: list[str] = field(default_factory=list)
    # number of tokens that continue a prompt
    max_new_tokens: int = 64

    def check(self) -> None:
        require(self.every >= 0, f"evaluation.every={self.every} must not be negative (0: never)")
        require(self.max_new_tokens >= 1, f"evaluation.max_new_tokens={self.max_new_tokens} must be at least 1")
        require(
            not self.prompts or self.every > 0,
            f"evaluation.prompts={list(self.prompts)} are continued at each validation, but evaluation.every=0: "
            "set the number of steps between two validations",
        )


@dataclass
class CheckpointConfig(Section):
    """The steps at which checkpoints are saved, and the checkpoints that are kept. `keep_best` also saves a checkpoint
    at each validation whose loss is the lowest so far."""

    # steps between two checkpoints; a checkpoint is also saved at the end; 0: only at the end
    every: int = 0
    # number of newest checkpoints to keep
    keep: int = 2
    # also keep checkpoints at multiples of this number of steps; 0: none
    keep_every: int = 0
    # also save and keep the checkpoint with the lowest validation loss
    keep_best: bool = False
    # continue training while a checkpoint is written
    asynchronous: bool = True

    def check(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every} must not be negative (0: only at the end)")
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")
        require(self.keep_every >= 0, f"checkpoint.keep_every={self.keep_every} must not be negative (0: none)")


@dataclass
class ExportConfig(Section):
    """Export of the finished run's last checkpoint as a Hugging Face folder."""

    # write the finished run's last checkpoint as a Hugging Face folder, run.dir/export
    at_end: bool = False
    # dtype of the exported weights; auto: the checkpoint's own
    dtype: ExportDtype = ExportDtype.auto
    # maximum size of a weights file, such as 5GB or 500MiB
    max_shard_size: str = "5GB"

    def check(self) -> None:
        bytes_of(self.max_shard_size, "export.max_shard_size=")


@dataclass
class LoggingConfig(Section):
    """Experiment trackers and the device's peak speed."""

    # offline: keep wandb's files in run.dir; online: send them to wandb; disabled: no wandb
    wandb: Wandb = Wandb.offline
    # write TensorBoard's files to run.dir
    tensorboard: bool = True
    # steps to trace with torch.profiler, after the first two of a start; the traces are in run.dir/profile; 0: none
    profile: int = 0
    # peak TFLOP/s of one device, for mfu and hfu; null: looked up by the device's name
    peak_tflops: float | None = None

    def check(self) -> None:
        require(self.profile >= 0, f"logging.profile={self.profile} must not be negative (0: none)")
        require(
            self.peak_tflops is None or self.peak_tflops > 0, f"logging.peak_tflops={self.peak_tflops} must be positive"
        )
