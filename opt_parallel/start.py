"""Open the inputs of a run, which are its text and the checkpoints of `resume` and `init_from`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opt_parallel.checkpoint.damage import tokenizer_of
from opt_parallel.checkpoint.folders import choose, newest
from opt_parallel.checkpoint.lora import Base, with_fallback
from opt_parallel.checkpoint.manifest import read_manifest
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.sources import Opened, open_checkpoint
from opt_parallel.checkpoint.store import Store
from opt_parallel.config.model import Labels
from opt_parallel.config.paths import absolute
from opt_parallel.config.run import Run
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.data.samples.samples import Samples
from opt_parallel.data.tasks import open_validation
from opt_parallel.engine import Engine
from opt_parallel.parallel.shard import Source, random_source, zeros
from opt_parallel.parallel.topology import Topology
from opt_parallel.report.trackers import check_trackers, wandb_id
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import say
from opt_parallel.runtime.process import is_main
from opt_parallel.validation import Prompts


@dataclass(frozen=True)
class Inputs:
    """The inputs that a run reads before it builds the engine. `initial` is the checkpoint of `init_from`, or None if
    the run does not read it. `base` is the same checkpoint if the run trains LoRA, else None."""

    initial: Opened | None
    base: Base | None
    data: Prepared
    held_out: Samples | None
    prompts: Prompts | None

    @classmethod
    def read(cls, run: Run, resume_from: Path | None) -> Inputs:
        """Read all inputs on this rank. No collective may be pending during the call, since the preparation of text may
        take hours.

        Raises: UserError."""
        check_trackers(run.logging.wandb)
        initial = _open_initial(run, resume_from)
        base = initial.as_base(str(run.init_from)) if initial and run.task.lora.rank else None
        data = prepare(run, tokenizer_of(resume_from))
        if initial and data.labels and resume_from is None:
            initial.check_labels(data.labels)
        prompts = Prompts.encode(run, data.tokenizer) if run.evaluation.prompts else None
        return cls(initial, base, data, open_validation(run, data), prompts)


def resume_point(run: Run, topology: Topology) -> Path | None:
    """The checkpoint from which the run resumes, as determined on rank 0, or None for a fresh start. Raises:
    UserError."""
    return topology.exchange(topology.together(lambda: choose(run.resume, run.folder)))[0]


def build_engine(
    run: Run,
    topology: Topology,
    store: Store,
    checkpoint: CheckpointReader | None,
    initial: Opened | None = None,
    labels: Labels | None = None,
) -> Engine:
    """Build the engine, with weights and optimizer state from `checkpoint` if there is one."""
    engine = Engine.build(run, topology, weights(run.seed, initial, checkpoint), labels)
    if initial:
        initial.warn_of_not_finite(topology.world)
    if checkpoint:
        store.restore(engine, checkpoint)
    return engine


def weights(seed: int, initial: Opened | None, checkpoint: CheckpointReader | None) -> Source:
    """The source of the model's weights. Each tensor is read from `init_from`, else it is randomly initialised. The
    tensors of the run's own checkpoint are zero, because `Store.restore` reads them: a rank then reads only the
    fragments whose optimizer state it holds, and not its complete part of each tensor."""
    source = random_source(seed)
    if initial:
        source = with_fallback(initial.stored.holds, initial.weights, source)
    return with_fallback(checkpoint.holds, zeros, source) if checkpoint else source


def open_store(run: Run, topology: Topology, resume_from: Path | None, inputs: Inputs) -> Store:
    """The checkpoint store, which saves the run's checkpoints and finds the checkpoint to resume from."""
    data, tracked = inputs.data, _wandb_id(run, resume_from)
    return Store(run, topology, data.tokenizer, data.labels, inputs.base, data.text, tracked)


def warn_of_unread_init(run: Run, resume_from: Path | None) -> None:
    """Warn that `init_from` is not read, if the run resumes from a checkpoint that was trained from another
    `init_from`."""
    if run.init_from is None or resume_from is None or run.task.lora.rank > 0:
        return
    try:
        earlier = read_manifest(resume_from)["config"].get("init_from")
    except UserError:
        return  # the checkpoint is damaged and will be renamed
    if earlier is None or absolute("", earlier) != absolute("", run.init_from):
        say(
            f"warning: init_from={run.init_from} is not read: the run resumes from {resume_from}, which started from "
            f"{earlier or 'random weights'}; choose another run.name or run.dir for a fresh start"
        )


def _open_initial(run: Run, resume_from: Path | None) -> Opened | None:
    """The checkpoint of `init_from`, or None if all weights are randomly initialised or read from the run's own
    checkpoint. A LoRA run reads `init_from` at every start, because its checkpoints do not contain the frozen weights.

    Every rank checks the tensors before it waits for another rank."""
    if run.init_from is None or (resume_from is not None and run.task.lora.rank == 0):
        return None
    opened = open_checkpoint(run.init_from, "init_from=", checksums=True)
    opened.check_md5("init_md5=", run.init_md5)
    opened = opened.grown(run.model.vocab_size)
    if run.task.name.classifies:
        opened.check_classifier()
    else:
        opened.check_language_model()
    return opened


def _wandb_id(run: Run, resume_from: Path | None) -> str | None:
    """The run's wandb id on rank 0, None on all other ranks. A new wandb id is created for a fresh start, and for a run
    that resumes from an older checkpoint or from another run's checkpoint, because wandb accepts each step only
    once."""
    if not is_main():
        return None
    if resume_from is None:
        return wandb_id(run.logging.wandb, run.folder, new=run.resume == "never")
    last = newest(run.folder / "checkpoints")
    try:
        saved = read_manifest(resume_from).get("wandb_id")
    except UserError:  # the checkpoint is damaged and will be renamed
        saved = None
    return wandb_id(run.logging.wandb, run.folder, saved, new=last is None or last.resolve() != resume_from.resolve())
