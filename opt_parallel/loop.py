"""The training loop, from the start of a run to its end. Read this module first, and then the engine, the model and the
parallel layers."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from opt_parallel.checkpoint.folders import newest, precision_of, step_of
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.store import Store
from opt_parallel.config.run import Run
from opt_parallel.config.units import bytes_of
from opt_parallel.data.prepare import Prepared
from opt_parallel.data.resuming import resumed_clock
from opt_parallel.data.samples.batches import Ahead, Feed, Loader
from opt_parallel.data.samples.mixture import Mixture
from opt_parallel.data.samples.samples import Rows
from opt_parallel.data.tasks import open_mixture
from opt_parallel.engine import Engine
from opt_parallel.parallel.precision import choose_precision
from opt_parallel.parallel.topology import Topology
from opt_parallel.planned import check_memory, explaining_out_of_memory
from opt_parallel.preflight import check_same, make_run_folder, preflight
from opt_parallel.report.metrics import Metrics
from opt_parallel.report.plots import draw_confusion
from opt_parallel.report.profiling import profiled
from opt_parallel.run_folder import (
    EXPORT,
    apply_retention,
    clean_up,
    lock_folder,
    write_config,
    write_state,
)
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import Diverged, Unread, UserError
from opt_parallel.runtime.log import log_to_file, say
from opt_parallel.runtime.process import is_main
from opt_parallel.runtime.signals import Interrupt
from opt_parallel.start import Inputs, build_engine, open_store, resume_point, warn_of_unread_init
from opt_parallel.storage.atomic import optional
from opt_parallel.tools.export import export, is_of
from opt_parallel.validation import validate


def train(run: Run) -> int:
    """Train until `run.stop`. Returns the exit status 0, or STOPPED or INTERRUPTED after a signal, on which the run is
    saved.

    Raises: UserError for a mistake of the user; Lost if another rank has ended or does not answer."""
    with ExitStack() as folder:  # rank 0 holds the folder's lock until the export is written
        with (
            Interrupt.watch() as interrupt,
            Topology.open(run.parallel.tensor, run.parallel.allow_cross_node) as topology,
        ):
            check_same(run, topology)
            resume_from = _lock(run, topology, folder)
            warn_of_unread_init(run, resume_from)
            # The result of rank 0 holds for all ranks.
            if topology.exchange(topology.together(lambda: _is_done(run, resume_from)))[0]:
                return 0
            topology.together(lambda: make_run_folder(run.folder))
            if topology.is_main:
                interrupt.last_words = partial(write_state, run.folder, "stopped")
            with log_to_file(run.folder), topology.losing(run.parallel.timeout):
                status = _train(run, resume_from, topology, interrupt)
        if status == 0 and newest(run.folder / "checkpoints") == run.folder / "checkpoints" / f"step-{run.steps}":
            _export_at_end(run, run.folder / "checkpoints" / f"step-{run.steps}")
        return status


def _lock(run: Run, topology: Topology, folder: ExitStack) -> Path | None:
    """Lock the run's folder, delete leftovers of killed processes, and return the checkpoint to resume from.

    Raises: UserError if another process holds the lock or the warm-up is longer than the run; the folder is then
    unchanged."""
    if resume_point(run, topology) is None:  # a mistake is reported before a folder is created
        run.check_warmup(Clock())
    topology.together(lambda: folder.enter_context(lock_folder(run.folder)) if topology.is_main else None)
    if topology.is_main:
        clean_up(run.folder)
    return resume_point(run, topology)  # another process may have saved a checkpoint before the lock


def _train(run: Run, resume_from: Path | None, topology: Topology, interrupt: Interrupt) -> int:
    precision, why = choose_precision(run.precision.name, run.zero.stage, topology, precision_of(resume_from))
    run = run.in_precision(precision)
    check_memory(run, topology)
    for line in preflight(run, topology):
        if topology.world.size > 1:
            say(line)
    with explaining_out_of_memory(run, topology):
        return _train_planned(run, why, resume_from, topology, interrupt)


def _train_planned(run: Run, why: str, resume_from: Path | None, topology: Topology, interrupt: Interrupt) -> int:
    """Train a run that fits the devices, in the precision that `why` explains."""
    inputs = topology.together(lambda: Inputs.read(run, resume_from))
    if topology.is_main:
        write_config(run)
        write_state(run.folder, "running")
    store = open_store(run, topology, resume_from, inputs)
    checkpoint = store.find()
    clock, mixture = _open_samples(run, topology, inputs.data, checkpoint)
    engine = build_engine(run, topology, store, checkpoint, inputs.initial, inputs.data.labels)
    loader = Loader(_feed(run, topology, mixture), clock, run.stop, topology.device)
    metrics = Metrics.open(run, topology.world.size, topology.is_main, topology.device, clock, store.wandb_id)
    metrics.note(_description(run, why, topology, clock, engine, mixture))
    topology.set_timeout(run.parallel.timeout)
    interrupt.can_save = True

    status = 0
    try:
        with profiled(run.logging.profile, run.folder, topology.world.rank) as step_ends:
            ahead = Ahead(loader, topology, lambda: interrupt.status)
            while clock.step < run.stop and not status:
                last = clock.step + 1 == run.stop
                batches, totals = ahead.take(last)
                result = engine.step(batches, clock, totals)
                clock = clock.after(run.global_batch, result.tokens)
                metrics.step(
                    clock, result.loss, result.grad_norm, result.lr, result.loss_scale, result.skipped,
                    ahead.waited, mixture.epochs(clock.samples),
                )  # fmt: skip
                step_ends()

                status = 0 if last else ahead.status()
                best = None
                if not status and _due(run.evaluation.every, clock, last):
                    with metrics.pause():
                        best = store.if_best(_evaluate(engine, clock, inputs, metrics))
                if status or last or best is not None or _due(run.checkpoint.every, clock, last):
                    with metrics.pause():
                        store.save(engine, clock, best)
        loader.close()
        store.finish()
    except UserError as error:
        metrics.abandon()
        _handle(error, engine, clock, store, loader)
        raise

    metrics.close(finished=clock.step == run.steps)
    if topology.is_main:
        write_state(run.folder, "stopped" if status else "done")
    if status:
        interrupt.ignore()
        topology.exchange(None)  # wait until all ranks ignore signals, since launchers kill all ranks when one exits
    engine.close()
    return status


def _open_samples(
    run: Run, topology: Topology, data: Prepared, checkpoint: CheckpointReader | None
) -> tuple[Clock, Mixture]:
    """The run's position in its data, and the mixture that returns the samples from this position on."""
    clock = resumed_clock(run, data.train, checkpoint.manifest) if checkpoint else Clock()
    run.check_warmup(clock)
    return clock, topology.together(lambda: open_mixture(run, data, clock))


def _feed(run: Run, topology: Topology, mixture: Mixture) -> Feed:
    rank, size = topology.data.rank, topology.data.size
    return Feed(mixture, run.global_batch, run.micro_batch, rank, size, run.model.pad_token_id)


def _handle(error: UserError, engine: Engine, clock: Clock, store: Store, loader: Loader) -> None:
    """Handle an error in the training loop. Save a checkpoint if the error is `Unread`, which leaves the weights
    intact. On any other error, only finish the save in progress.

    Raises: Unread with the path of the checkpoint that was saved."""
    if isinstance(error, Unread):
        raise Unread(f"{error}; {store.rescue(engine, clock)}", shared=True) from error
    store.wait()
    if isinstance(error, Diverged):
        if engine.topology.is_main:
            write_state(engine.run.folder, "diverged")
        loader.close()  # a sweep trains its next run in the same process
        engine.close()


def _evaluate(engine: Engine, clock: Clock, inputs: Inputs, metrics: Metrics) -> float | None:
    """Validate, and write continuations of the prompts. Returns the loss on the held-out text, or None if there is no
    held-out text."""
    result, held_out, labels = None, inputs.held_out, inputs.data.labels
    if held_out is not None:
        result = validate(engine, held_out, labels)
        unigrams = held_out.unigram_entropy if isinstance(held_out, Rows) else None
        metrics.validation(clock, result.loss, unigrams, result.figures)
        if labels and result.confusion is not None and engine.topology.is_main:
            title = f"{engine.run.name}, step {clock.step}"
            picture = engine.run.folder / "confusion.png"
            with optional(picture):
                draw_confusion(picture, title, labels.names, result.confusion)
    if inputs.prompts is not None:
        metrics.samples(clock, inputs.prompts.texts(engine, clock.step))
    return None if result is None else result.loss


def _due(every: int, clock: Clock, last: bool) -> bool:
    """Whether an action is due that happens every `every` steps and at the end. With `every=0` the action is never
    due."""
    return every > 0 and (last or clock.step % every == 0)


def _is_done(run: Run, resume_from: Path | None) -> bool:
    """Whether the run has no steps left. A run without steps left is reported, and its export, deletion of old
    checkpoints and state file are completed."""
    step = None if resume_from is None else step_of(resume_from)
    if resume_from is None or step is None or step < run.stop:
        return False
    if step < run.steps:
        say(f"{run.name} has reached stop_at={run.stop_at} at {resume_from}; a larger stop_at continues the run")
    else:
        say(f"{run.name} is finished: {resume_from} is at step {step} of {run.steps}; larger steps continue the run")
        _export_at_end(run, resume_from)
    if is_main():
        apply_retention(run.folder)
        write_state(run.folder, "done")
    return True


def _export_at_end(run: Run, checkpoint: Path) -> None:
    """Export the last checkpoint of the finished run, unless the folder `export` already holds this checkpoint.

    Only rank 0 exports, at a time when no other rank waits in a collective."""
    output = run.folder / EXPORT
    if not run.export.at_end or not is_main():
        return
    if is_of(output, checkpoint):
        say(f"{output} already holds {checkpoint.name}: remove the folder to export again")
        return
    size = bytes_of(run.export.max_shard_size, "export.max_shard_size=")
    try:
        export(checkpoint, output, size, run.export.dtype, replace=True)
    except UserError as error:
        raise UserError(
            f"export.at_end: {error}; {checkpoint} is complete, and the same command exports it again"
        ) from error
    say(f"exported {checkpoint} to {output}")


def _description(run: Run, why: str, topology: Topology, clock: Clock, engine: Engine, mixture: Mixture) -> str:
    fresh = "starting" if run.init_from is None else f"starting from {run.init_from}"
    start = f"continuing at step {clock.step}" if clock.step else fresh
    lora, trained = run.task.lora, ""
    if lora.rank:
        number = sum(math.prod(tensor["shape"]) for tensor in engine.tensors().values())
        trained = f" and {number:,} that LoRA trains (rank {lora.rank} on {', '.join(lora.targets)})"
    sources = "\n" + mixture.summary(run.samples_at_end(clock)) if len(mixture.sources) > 1 else ""
    return (
        f"{start}: {run.name}, {run.model.parameters() / 1e6:,.1f}M parameters{trained}, "
        f"data({topology.data.size}) × tensor({topology.tensor.size}) on {topology.device.type}, "
        f"ZeRO-{run.zero.stage}, {run.precision.name.value}{f' (precision=auto: {why})' if why else ''}, "
        f"{run.global_batch} × {run.data.sequence_length} tokens a step, to step {run.stop}{sources}"
    )
