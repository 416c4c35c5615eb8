"""A run from start to end. Read this page first, then down: engine, model, parallel layers."""

from __future__ import annotations

from opt_parallel.checkpoint.store import Store, choose, step_of
from opt_parallel.clock import Clock
from opt_parallel.compose import to_yaml
from opt_parallel.config import Run
from opt_parallel.data.batches import Feed, unigram_entropy, validation_batches
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.engine import Engine
from opt_parallel.errors import UserError
from opt_parallel.evaluate import validation_loss
from opt_parallel.interrupt import Interrupt
from opt_parallel.log import say
from opt_parallel.metrics import Metrics
from opt_parallel.parallel.shard import random_source
from opt_parallel.topology import Topology, check_precision, local_device

INTERRUPTED = 130  # the status of a process that Ctrl-C ended, by the shell's convention


def train(run: Run) -> int:
    """Train until `run.stop`; the process's exit status.

    Raises: UserError for what the user can mend."""
    check_precision(run.precision.name, local_device())
    if _already_finished(run):
        return 0
    data = prepare(run)
    with Topology.open(run.parallel.tensor) as topology, Interrupt.watch() as interrupt:
        _write_config(run, topology)
        engine = Engine.build(run, topology, random_source(run.seed))
        store = Store(run, topology, data.tokenizer)
        clock = store.resume(engine)
        feed = Feed(data.train, run.seed, run.global_batch, run.micro_batch, topology.data.rank, topology.data.size)
        metrics = Metrics.open(run, topology.world.size, topology.is_main, topology.device, clock)
        metrics.note(_greeting(run, topology, clock))

        stopped = False
        while clock.step < run.stop and not stopped:
            batches = feed.at(clock.samples)
            result = engine.step(batches, clock.step)
            clock = clock.after(run.global_batch, result.targets)
            metrics.step(clock, result.loss, result.grad_norm, result.lr, result.loss_scale, result.skipped)

            stopped = topology.any(interrupt.requested)
            last = stopped or clock.step == run.stop
            if _due(run.evaluation.every, clock, last and not stopped):
                _validate(run, data, engine, clock, metrics)
            if _due(run.checkpoint.every, clock, last) or last:
                with metrics.pause():
                    store.save(engine, clock)

        metrics.close(finished=clock.step == run.steps)
        engine.close()
    return INTERRUPTED if stopped else 0


def _due(every: int, clock: Clock, last: bool) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return every > 0 and (last or clock.step % every == 0)


def _validate(run: Run, data: Prepared, engine: Engine, clock: Clock, metrics: Metrics) -> None:
    assert data.validation is not None
    ranks = engine.topology.data
    with metrics.pause():
        batches = validation_batches(data.validation, run.micro_batch, ranks.rank, ranks.size)
        loss = validation_loss(engine, batches)
        metrics.validation(clock, loss, unigram_entropy(data.validation))


def _already_finished(run: Run) -> bool:
    folder = choose(run)
    step = None if folder is None else step_of(folder)
    if step is None or step < run.stop:
        return False
    say(f"{run.run.name} is finished: {folder} is at step {step} of {run.steps}; a larger steps continues it")
    return True


def _write_config(run: Run, topology: Topology) -> None:
    if topology.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "config.yaml").write_text(to_yaml(run))
        except OSError as error:
            raise UserError(f"run.dir={run.run.dir} cannot be written: {error.strerror}") from error


def _greeting(run: Run, topology: Topology, clock: Clock) -> str:
    start = f"continuing at step {clock.step}" if clock.step else "starting"
    return (
        f"{start}: {run.run.name}, {run.model.parameters() / 1e6:,.1f}M parameters, data({topology.data.size}) × "
        f"tensor({topology.tensor.size}) on {topology.device.type}, ZeRO-{run.zero.stage}, "
        f"{run.precision.name.value}, {run.global_batch} × {run.data.sequence_length} tokens a step, to step {run.stop}"
    )
