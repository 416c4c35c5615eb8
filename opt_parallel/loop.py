"""A run from start to end. Read this page first, then down: engine, model, parallel layers."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opt_parallel.checkpoint.damage import tokenizer_of
from opt_parallel.checkpoint.folders import choose, newest, precision_of, step_of
from opt_parallel.checkpoint.lora import Base, over
from opt_parallel.checkpoint.manifest import read_manifest
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.sources import Opened, open_checkpoint
from opt_parallel.checkpoint.store import Store
from opt_parallel.config.paths import absolute
from opt_parallel.config.run import Run
from opt_parallel.config.units import bytes_of
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.data.resuming import go_on
from opt_parallel.data.samples.batches import Feed, Loader, read_together
from opt_parallel.data.samples.mixture import Mixture
from opt_parallel.data.samples.samples import Rows, Samples
from opt_parallel.data.tasks import open_mixture, open_validation
from opt_parallel.engine import Engine
from opt_parallel.parallel.precision import settle
from opt_parallel.parallel.shard import Source, random_source
from opt_parallel.parallel.topology import Topology
from opt_parallel.preflight import check_same, claim_folder, preflight
from opt_parallel.report.metrics import Metrics
from opt_parallel.report.plots import draw_confusion
from opt_parallel.report.trackers import check_trackers, wandb_id
from opt_parallel.run_folder import (
    EXPORT,
    forget_what_the_last_save_would,
    only_run_in,
    put_in_order,
    write_config,
    write_state,
)
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import Diverged, Unread, UserError
from opt_parallel.runtime.log import own_file, say
from opt_parallel.runtime.process import is_main
from opt_parallel.runtime.signals import Interrupt
from opt_parallel.storage.atomic import optional
from opt_parallel.tools.export import export, is_of
from opt_parallel.validation import Prompts, validate


@dataclass(frozen=True)
class Materials:
    """What a run needs before there is an engine: weights to start from, text."""

    start: Opened | None
    base: Base | None
    data: Prepared
    held_out: Samples | None
    prompts: Prompts | None

    @classmethod
    def gather(cls, run: Run, begun: Path | None) -> Materials:
        """On every rank, while none waits in a collective: text may take hours to prepare. `begun`: the checkpoint that
        the run goes on from. Raises: UserError."""
        check_trackers(run)
        start = _start(run, begun)
        base = start.as_base(str(run.init_from)) if start and run.task.lora.rank else None
        data = prepare(run, tokenizer_of(begun))
        if start and data.labels and begun is None:
            start.check_labels(data.labels)
        prompts = Prompts.encode(run, data.tokenizer) if run.evaluation.prompts else None
        return cls(start, base, data, open_validation(run, data), prompts)


def train(run: Run) -> int:
    """Train until `run.stop`; the process's exit status: 0, or STOPPED or INTERRUPTED where a signal asked to stop and
    the run is saved.

    Raises: UserError for what the user can mend; Lost where another rank is gone."""
    with ExitStack() as folder:  # rank 0's, until it has exported
        with (
            Interrupt.watch() as interrupt,
            Topology.open(run.parallel.tensor, run.parallel.allow_cross_node) as topology,
        ):
            check_same(run, topology)
            resume_from = _occupy(run, topology, folder)
            _warn_of_another_start(run, resume_from)
            if topology.exchange(topology.together(lambda: _nothing_left(run, resume_from)))[0]:  # as rank 0 sees it
                return 0
            topology.together(lambda: claim_folder(run))
            if topology.is_main:
                interrupt.last_words = partial(write_state, run, "stopped")
            with own_file(run.folder), topology.losing(run.parallel.timeout):
                status = _train(run, resume_from, topology, interrupt)
        if status == 0 and newest(run.folder / "checkpoints") == run.folder / "checkpoints" / f"step-{run.steps}":
            _export_at_end(run, run.folder / "checkpoints" / f"step-{run.steps}")
        return status


def _occupy(run: Run, topology: Topology, folder: ExitStack) -> Path | None:
    """Make this run the only one in its folder, and put that in order; the checkpoint that `resume` asks for.

    Raises: UserError, with nothing touched, if another run trains there, or the settings do not fit."""
    if topology.exchange(topology.together(lambda: choose(run)))[0] is None:  # a mistake leaves no new folder
        run.check_warmup(Clock())
    topology.together(lambda: folder.enter_context(only_run_in(run)) if topology.is_main else None)
    if topology.is_main:
        put_in_order(run)
    return topology.exchange(topology.together(lambda: choose(run)))[0]  # others may not see the newest yet


def _train(run: Run, begun: Path | None, topology: Topology, interrupt: Interrupt) -> int:
    run, why = settle(run, topology, precision_of(begun))
    for line in preflight(run, topology):
        if topology.world.size > 1:
            say(line)
    materials = topology.together(lambda: Materials.gather(run, begun))
    if topology.is_main:
        write_config(run)
        write_state(run, "running")
    store = _open_store(run, begun, topology, materials)
    engine, clock, mixture = _begin(run, topology, store, materials)
    loader = Loader(_feed(run, topology, mixture), clock, run.stop, topology.device)
    metrics = Metrics.open(run, topology.world.size, topology.is_main, topology.device, clock, store.wandb_id)
    metrics.note(_greeting(run, why, topology, clock, engine, mixture))
    topology.set_timeout(run.parallel.timeout)
    interrupt.patient = True

    status = 0
    try:
        while clock.step < run.stop and not status:
            result = engine.step(read_together(loader.next, topology), clock)
            clock = clock.after(run.global_batch, result.tokens)
            metrics.step(
                clock, result.loss, result.grad_norm, result.lr, result.loss_scale, result.skipped,
                loader.waited, mixture.epochs(clock.samples),
            )  # fmt: skip

            last = clock.step == run.stop
            status = 0 if last else topology.largest(interrupt.status)
            best = None
            if not status and _due(run.evaluation.every, clock, last):
                with metrics.pause():
                    best = store.if_best(_evaluate(engine, clock, materials, metrics))
            if status or last or best is not None or _due(run.checkpoint.every, clock, last):
                with metrics.pause():
                    store.save(engine, clock, best)
        loader.close()
        store.finish()
    except UserError as error:
        metrics.abandon()
        if isinstance(error, Unread):
            raise Unread(f"{error}; {store.rescue(engine, clock)}", shared=True) from error
        store.wait()
        if isinstance(error, Diverged):
            if topology.is_main:
                write_state(run, "diverged")
            loader.close()  # the next run of a sweep follows in this process
            engine.close()
        raise

    metrics.close(finished=clock.step == run.steps)
    if topology.is_main:
        write_state(run, "stopped" if status else "done")
    if status:
        interrupt.ignore()
        topology.exchange(None)  # nobody ends before all ignore, and the state is written: launchers kill the rest
    engine.close()
    return status


def _open_store(run: Run, begun: Path | None, topology: Topology, materials: Materials) -> Store:
    data = materials.data
    return Store(run, topology, data.tokenizer, data.labels, materials.base, data.text, _wandb_id(run, begun))


def _feed(run: Run, topology: Topology, mixture: Mixture) -> Feed:
    rank, size = topology.data.rank, topology.data.size
    return Feed(mixture, run.global_batch, run.micro_batch, rank, size, run.model.pad_token_id)


def _begin(run: Run, topology: Topology, store: Store, materials: Materials) -> tuple[Engine, Clock, Mixture]:
    """The run's network, where it stands, and its samples: as its checkpoint left them, else from the start."""
    checkpoint, data, start = store.find(), materials.data, materials.start
    clock = go_on(run, data.train, checkpoint.manifest) if checkpoint else Clock()
    run.check_warmup(clock)
    mixture = topology.together(lambda: open_mixture(run, data, clock))
    engine = Engine.build(run, topology, _weights(run, start, checkpoint), data.labels)
    if start:
        start.warn_of_not_finite(topology.tensor)
    if checkpoint:
        store.restore(engine, checkpoint)
    return engine, clock, mixture


def _evaluate(engine: Engine, clock: Clock, materials: Materials, metrics: Metrics) -> float | None:
    """The loss on the held-out text, where there is some."""
    found, held_out, labels = None, materials.held_out, materials.data.labels
    if held_out is not None:
        found = validate(engine, held_out, labels)
        unigrams = held_out.unigram_entropy if isinstance(held_out, Rows) else None
        metrics.validation(clock, found.loss, unigrams, found.figures)
        if labels and found.confusion is not None and engine.topology.is_main:
            title = f"{engine.run.run.name}, step {clock.step}"
            picture = engine.run.folder / "confusion.png"
            with optional(picture):
                draw_confusion(picture, title, labels.names, found.confusion)
    if materials.prompts is not None:
        metrics.samples(clock, materials.prompts.texts(engine, clock.step))
    return None if found is None else found.loss


def _due(every: int, clock: Clock, last: bool) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return every > 0 and (last or clock.step % every == 0)


def _nothing_left(run: Run, begun: Path | None) -> bool:
    step = None if begun is None else step_of(begun)
    if begun is None or step is None or step < run.stop:
        return False
    if step < run.steps:
        say(f"{run.run.name} is at stop_at={run.stop_at}: {begun}; a later stop_at continues it")
    else:
        say(f"{run.run.name} is finished: {begun} is at step {step} of {run.steps}; a larger steps continues it")
        _export_at_end(run, begun)
    if is_main():
        forget_what_the_last_save_would(run)
        write_state(run, "done")
    return True


def _export_at_end(run: Run, checkpoint: Path) -> None:
    """Write the finished run's `export`, unless it is there already, of the same checkpoint.

    Rank 0 does it alone, and no group waits for it."""
    output = run.folder / EXPORT
    if not run.export.at_end or not is_main():
        return
    if is_of(output, checkpoint):
        say(f"{output} is there already, of that checkpoint: remove it to write it anew")
        return
    size = bytes_of(run.export.max_shard_size, "export.max_shard_size=")
    try:
        export(checkpoint, output, size, run.export.dtype, replace=True)
    except UserError as error:
        raise UserError(
            f"export.at_end: {error}; {checkpoint} is safe, and the same command tries the export again"
        ) from error
    say(f"exported {checkpoint} to {output}")


def _start(run: Run, begun: Path | None) -> Opened | None:
    """The checkpoint whose weights the run begins with, None where it draws or resumes its own. Those that LoRA leaves
    alone are read at each start.

    Its tensors are checked on every rank, before any of them waits for another."""
    if run.init_from is None or (begun is not None and run.task.lora.rank == 0):
        return None
    opened = open_checkpoint(run.init_from, "init_from=", checksums=True).grown(run.model.vocab_size)
    if run.task.name.classifies:
        opened.check_classifier()
    else:
        opened.check_language_model()
    return opened


def _weights(run: Run, start: Opened | None, checkpoint: CheckpointReader | None) -> Source:
    """What the network is filled with: the checkpoint's tensors, where it lacks them those that the run starts from,
    and where these do too, the initial ones."""
    source = random_source(run.seed)
    if start:
        source = over(start.stored.holds, start.weights, source)
    return over(checkpoint.holds, checkpoint, source) if checkpoint else source


def _wandb_id(run: Run, begun: Path | None) -> str | None:
    """What the run is called at wandb, on rank 0. It is another run where it begins anew or branches off: from another
    folder's checkpoint, or an earlier one of its own, since wandb takes no step back."""
    if not is_main():
        return None
    if begun is None:
        return wandb_id(run, anew=run.resume == "never")
    last = newest(run.folder / "checkpoints")
    try:
        saved = read_manifest(begun).get("wandb_id")
    except UserError:  # it is damaged, and will be set aside
        saved = None
    return wandb_id(run, saved, anew=last is None or last.resolve() != begun.resolve())


def _warn_of_another_start(run: Run, begun: Path | None) -> None:
    """Say that `init_from` is not read where the run goes on from a checkpoint that began elsewhere."""
    if run.init_from is None or begun is None or run.task.lora.rank > 0:
        return
    try:
        began = read_manifest(begun)["config"].get("init_from")
    except UserError:
        return  # it is damaged, and will be set aside
    if began is None or absolute("", began) != absolute("", run.init_from):
        say(
            f"warning: init_from={run.init_from} is not read: {begun} goes on, which began from "
            f"{began or 'random weights'}; choose another run.name or run.dir to start anew"
        )


def _greeting(run: Run, why: str, topology: Topology, clock: Clock, engine: Engine, mixture: Mixture) -> str:
    fresh = "starting" if run.init_from is None else f"starting from {run.init_from}"
    start = f"continuing at step {clock.step}" if clock.step else fresh
    lora, trained = run.task.lora, ""
    if lora.rank:
        number = sum(math.prod(tensor["shape"]) for tensor in engine.tensors().values())
        trained = f" and {number:,} that LoRA trains (rank {lora.rank} on {', '.join(lora.targets)})"
    sources = "\n" + mixture.words(run.samples_at_end(clock)) if len(mixture.sources) > 1 else ""
    return (
        f"{start}: {run.run.name}, {run.model.parameters() / 1e6:,.1f}M parameters{trained}, "
        f"data({topology.data.size}) × tensor({topology.tensor.size}) on {topology.device.type}, "
        f"ZeRO-{run.zero.stage}, {run.precision.name.value}{f' (precision=auto: {why})' if why else ''}, "
        f"{run.global_batch} × {run.data.sequence_length} tokens a step, to step {run.stop}{sources}"
    )
