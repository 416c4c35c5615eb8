"""The typed configuration of a run, with one section for each group of configs/ and with checks across sections.

Hydra composes YAML files and the command line into the types of this module (`compose.py`), and refuses unknown keys
and wrong types. A `Run` checks its values when it is created and is immutable afterwards. This module does not import
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from opt_parallel.config.data import DataConfig
from opt_parallel.config.model import ModelConfig, Section, require
from opt_parallel.config.optimizer import OptimizerConfig, StateDtype
from opt_parallel.config.output import CheckpointConfig, EvaluationConfig, ExportConfig, LoggingConfig
from opt_parallel.config.paths import PATH
from opt_parallel.config.task import TaskConfig
from opt_parallel.runtime.clock import Clock


class Offload(Enum):
    none = "none"
    cpu = "cpu"


class Precision(Enum):
    """Training dtypes. With `auto`, `choose_precision` selects bf16 if the device supports it natively, else fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Scaler(Enum):
    """Kinds of the fp16 loss scaler. With `paper`, the window doubles and halves with the scale, as in the training of
    OPT-175B. With `standard`, the window is fixed."""

    paper = "paper"
    standard = "standard"


class ScheduleName(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class ActivationCheckpointing(Enum):
    """What a layer keeps between its forward and its backward. The backward computes the rest again."""

    none = "none"
    selective = "selective"
    full = "full"
    offload = "offload"


@dataclass
class ParallelConfig(Section):
    """The grid of processes, with world size = data-parallel degree × tensor-parallel degree."""

    # tensor-parallel degree, the number of processes that split each layer; the data-parallel degree is world size /
    # tensor
    tensor: int = 1
    # with tensor > 1, split LayerNorm, dropout and residuals over the positions; the losses do not depend on it
    sequence: bool = True
    # allow tensor groups across hosts; every layer then waits for the network between them
    allow_cross_node: bool = False
    # seconds that a collective waits for a rank before the run fails and its launcher restarts it
    timeout: float = 600.0

    def check(self) -> None:
        require(self.tensor >= 1, f"parallel.tensor={self.tensor} must be at least 1")
        require(self.timeout > 0, f"parallel.timeout={self.timeout} must be positive: seconds to wait for a rank")


@dataclass
class ZeroConfig(Section):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020). Sizes count elements."""

    # 0 partitions nothing (fp32 only), and communicates gradients once in a step; 1 and 2 are the same: they partition
    # the optimizer state and the gradients over the data ranks, and sum gradients in each micro-batch; 3 also
    # partitions weights
    stage: int = 1
    # cpu: keep the optimizer's state in the host's memory and update the weights on the CPU
    offload: Offload = Offload.none
    # number of elements in one gradient reduction; stages 1 and 2 have two fp32 buffers of this size
    reduce_bucket_size: int = 50_000_000
    # number of elements gathered in advance, stage 3
    prefetch_bucket_size: int = 50_000_000
    # parameters with fewer elements are not partitioned, stage 3
    persistence_threshold: int = 100_000

    def check(self) -> None:
        require(0 <= self.stage <= 3, f"zero.stage={self.stage} does not exist: choose 0, 1, 2 or 3")
        require(
            self.offload is Offload.none or self.stage >= 1,
            f"zero.offload={self.offload.value} moves ZeRO's optimizer state, which zero.stage=0 does not have: "
            "use zero.stage=1, 2 or 3, or zero.offload=none",
        )
        require(self.reduce_bucket_size >= 1, f"zero.reduce_bucket_size={self.reduce_bucket_size} must be at least 1")
        for name in ("prefetch_bucket_size", "persistence_threshold"):
            require(getattr(self, name) >= 0, f"zero.{name}={getattr(self, name)} must not be negative")


@dataclass
class PrecisionConfig(Section):
    """The training dtype and the settings of fp16's loss scale."""

    # auto: bf16 if every rank's device supports it natively, else fp32; a resumed run keeps its precision
    name: Precision = Precision.auto
    # for fp16, paper doubles and halves the window with the scale, as for OPT-175B; standard keeps the window fixed
    scaler: Scaler = Scaler.paper
    # the loss scale of fp16 at the start
    initial_scale: float = 4.0
    # number of steps without overflow after which the loss scale of fp16 doubles
    window: int = 256
    # the lowest loss scale of fp16; an overflow at this scale ends the run
    floor: float = 2.0**-5

    def check(self) -> None:
        require(self.window >= 1, f"precision.window={self.window} must be at least 1")
        require(self.floor > 0, f"precision.floor={self.floor} must be positive")
        require(
            self.initial_scale >= self.floor,
            f"precision.initial_scale={self.initial_scale} is below precision.floor={self.floor}",
        )


@dataclass
class ScheduleConfig(Section):
    """The learning-rate schedule. After a linear warm-up over steps or tokens, the schedule `name` ends at
    `final_ratio` of the peak."""

    # the schedule after the warm-up; docs/resuming.md has the formulas
    name: ScheduleName = ScheduleName.linear
    # steps of linear warm-up; null: set by warmup_tokens, else no warm-up
    warmup_steps: int | None = None
    # tokens of linear warm-up; null: set by warmup_steps
    warmup_tokens: int | None = None
    # learning rate at the last step, as a fraction of the peak
    final_ratio: float = 0.1

    def check(self) -> None:
        require(
            self.warmup_steps is None or self.warmup_tokens is None,
            f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_tokens={self.warmup_tokens} "
            "both set the warm-up: set one to null",
        )
        for name in ("warmup_steps", "warmup_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"schedule.{name}={value} must not be negative")
        require(0 <= self.final_ratio <= 1, f"schedule.final_ratio={self.final_ratio} must lie between 0 and 1")

    def warmup_at(self, batch_tokens: int) -> int:
        """Number of warm-up steps if each step has `batch_tokens` tokens. `warmup_tokens` are rounded up to full
        steps."""
        if self.warmup_tokens is not None:
            return -(-self.warmup_tokens // batch_tokens)
        return self.warmup_steps or 0


@dataclass
class RunConfig(Section):
    """The run's name and folder."""

    # the run's name in logs and trackers
    name: str = "run"
    # the run's folder
    dir: str = field(default="runs/run", metadata=PATH)


@dataclass
class PlanConfig(Section):
    """The comparison of the planned memory with the device's, before training starts."""

    # refuse to train if the planned memory exceeds the device's; false: warn and train
    enforce: bool = True


@dataclass
class Run(Section):
    """All settings of a run. With `init_from`, `start_from_checkpoint` has set `model` from the checkpoint of
    `init_from`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    # global: sequences of one optimizer step; micro: sequences of one forward of one data-parallel rank
    batch: dict[str, int] = field(default_factory=lambda: {"global": 8, "micro": 1})
    # what each layer recomputes in the backward instead of keeping it; selective: LayerNorms, dropout and the
    # feed-forward's first product and activation; full: everything but its input; offload: full, with the inputs in the
    # host's memory
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    # number of optimizer steps of the run and of its learning-rate schedule
    steps: int = 1000
    # the run saves and exits at this step, and a larger stop_at continues the run; null: exit at steps
    stop_at: int | None = None
    # run a step of the first of this many ranks on fake CUDA tensors and exit, without a GPU; 0: train
    rehearse: int = 0
    # seed of the initial weights, the order of samples, and dropout
    seed: int = 1
    # weights to start from: a Hugging Face folder, a hub id, a training checkpoint or a metaseq folder; null: random
    init_from: str | None = field(default=None, metadata=PATH)
    # a list of MD5 sums with which the files of init_from, a metaseq folder, are compared first; null: none
    init_md5: str | None = field(default=None, metadata=PATH)
    # auto: resume from the newest complete checkpoint of run.dir; never: start again; or the folder of a checkpoint
    resume: str = field(default="auto", metadata={"path": ("auto", "never")})

    def check(self) -> None:
        require(
            set(self.batch) == {"global", "micro"},
            f"batch has {', '.join(sorted(self.batch)) or 'nothing'}: give it exactly the keys global and micro",
        )
        for name, value in self.batch.items():
            require(value >= 1, f"batch.{name}={value} must be at least 1")
        require(self.steps >= 1, f"steps={self.steps} must be at least 1")
        require(self.stop_at is None or self.stop_at >= 1, f"stop_at={self.stop_at} must be at least 1")
        require(self.rehearse >= 0, f"rehearse={self.rehearse} must not be negative (0: train)")
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        given = bool(self.data.validation_sources or self.evaluation.prompts)
        require(
            self.evaluation.every == 0 or given or self.holds_out,
            f"evaluation.every={self.evaluation.every} needs text to validate on: set data.validation, "
            "evaluation.prompts, or data.held_out if data.train is not a stream; or set evaluation.every=0",
        )
        require(
            self.task.name.plain_text or not any(source.stream for source in self.data.train_sources),
            f"task={self.task.name.value} needs all examples before step 1: set stream to false",
        )
        validates = self.evaluation.every > 0 and bool(self.data.validation_sources or self.holds_out)
        require(
            validates or not self.checkpoint.keep_best,
            f"checkpoint.keep_best=true needs a validation loss, but evaluation.every={self.evaluation.every}, "
            f"data.validation={self.data.validation}: set both",
        )
        require(
            not (self.task.name.classifies and self.evaluation.prompts),
            f"evaluation.prompts={list(self.evaluation.prompts)}: a classifier (task=classify) writes no text: set []",
        )
        self._check_model_fits()
        require(
            self.task.name.plain_text or not any(source.template for source in self.data.train_sources),
            f"task={self.task.name.value} cannot use a template, which is for task=pretrain: set the template to null",
        )
        require(
            self.task.lora.rank == 0 or self.init_from is not None,
            f"task.lora.rank={self.task.lora.rank} adapts a trained network: set init_from=… to its "
            "checkpoint, or task.lora.rank=0 to train every parameter",
        )
        require(
            self.zero.stage > 0 or self.precision.name in (Precision.fp32, Precision.auto),
            f"precision={self.precision.name.value} needs ZeRO's fp32 master weights, which zero.stage=0 does not "
            "keep: use zero.stage=1, 2 or 3, or precision=fp32",
        )
        self._check_state_dtype()
        require(
            (self.schedule.warmup_steps or 0) <= self.steps,
            f"the warm-up takes {self.schedule.warmup_steps} steps but steps={self.steps}: shorten "
            "schedule.warmup_steps, or train longer",
        )

    def _check_state_dtype(self) -> None:
        if self.optimizer.state_dtype is StateDtype.fp32:
            return
        require(
            self.precision.name in (Precision.bf16, Precision.auto) and self.zero.stage > 0,
            f"optimizer.state_dtype=bf16 updates the bf16 weights of the network, which precision="
            f"{self.precision.name.value} with zero.stage={self.zero.stage} does not have: use precision=bf16 with "
            "zero.stage=1, 2 or 3, or optimizer.state_dtype=fp32",
        )
        require(
            self.zero.offload is Offload.none,
            f"zero.offload={self.zero.offload.value} updates a second copy of the weights in the host's memory, which "
            "optimizer.state_dtype=bf16 does not have: use zero.offload=none, or optimizer.state_dtype=fp32",
        )

    def _check_model_fits(self) -> None:
        self.model.check_splits(self.parallel.tensor, "parallel.tensor=")
        require(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"data.sequence_length={self.data.sequence_length} > model.max_position_embeddings="
            f"{self.model.max_position_embeddings}: shorten the sequence or lengthen the position table",
        )

    def check_warmup(self, clock: Clock) -> None:
        """Raise UserError if a warm-up in tokens would not end before the run does. `clock` is the run's position."""
        wanted, left = self.schedule.warmup_tokens or 0, self.steps - clock.step
        require(
            wanted <= clock.tokens + left * self.batch_tokens,
            f"schedule.warmup_tokens={wanted:,} is more than the run reads until steps={self.steps}, with "
            f"{clock.tokens:,} tokens at step {clock.step} and {self.batch_tokens:,} tokens a step: shorten the "
            "warm-up or train longer",
        )

    def check_world(self, world_size: int) -> None:
        """Raise `UserError` unless the process grid and the batch fit `world_size` processes."""
        tensor = self.parallel.tensor
        require(
            world_size % tensor == 0,
            f"data({world_size // tensor}) × tensor({tensor}) ≠ world size {world_size}: start a multiple of {tensor} "
            f"processes (torchrun --nproc-per-node={tensor} -m opt_parallel train …) or change parallel.tensor",
        )
        data = world_size // tensor
        stride = self.micro_batch * data
        require(
            self.global_batch % stride == 0,
            f"batch.global={self.global_batch} is not a multiple of batch.micro({self.micro_batch}) × data({data}) = "
            f"{stride}; choose {_nearest_multiple(self.global_batch, stride)}",
        )

    @property
    def holds_out(self) -> bool:
        """Whether a share of the training documents is held out for validation."""
        wanted = self.evaluation.every > 0 and self.data.held_out > 0 and not self.data.validation_sources
        return wanted and not any(source.stream for source in self.data.train_sources)

    @property
    def global_batch(self) -> int:
        return self.batch["global"]

    @property
    def micro_batch(self) -> int:
        return self.batch["micro"]

    @property
    def batch_tokens(self) -> int:
        """Number of tokens of one optimizer step."""
        return self.global_batch * self.data.sequence_length

    def samples_at_end(self, clock: Clock) -> int:
        """Number of samples that the run has consumed after its last step, if its position is now `clock`."""
        return clock.samples + (self.steps - clock.step) * self.global_batch

    def in_precision(self, name: Precision) -> Run:
        """The same run, computed in the precision `name`."""
        return replace(self, precision=replace(self.precision, name=name))

    @property
    def stop(self) -> int:
        """The step at which this process stops."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)

    @property
    def name(self) -> str:
        """The run's name in logs and trackers, `run.name` on the command line."""
        return self.run.name

    @property
    def folder(self) -> Path:
        """`run.dir` as a path."""
        return Path(self.run.dir)


def _nearest_multiple(value: int, stride: int) -> str:
    below, above = value // stride * stride, -(-value // stride) * stride
    return f"{below} or {above}" if below else f"{above}"
