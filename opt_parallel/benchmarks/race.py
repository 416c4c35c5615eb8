"""Measure several trainers in turns. Each trainer has its own processes, which wait while another trainer is measured.

Every round measures all trainers within seconds, which matters on a host that other users share. Start, import and
compilation are not measured.
"""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from opt_parallel.benchmarks.contenders import CONTENDERS, PRODUCT, PRODUCT_SIZE, PRODUCTS, Contender
from opt_parallel.config.run import Run
from opt_parallel.parallel.topology import local_device
from opt_parallel.report.metrics import forget_peak_memory, peak_memory
from opt_parallel.runtime.errors import one_line
from opt_parallel.runtime.log import quiet_libraries

WARM_UP = 2  # Number of steps for compilation and first allocations, before the measurements.
ANSWER_TIMEOUT = 1200.0  # Seconds to wait for a process.


@dataclass
class Result:
    """The measurements of a trainer. `tokens_per_second` has one rate of all processes together for each round.
    `peak_memory_bytes` is the largest peak of a process."""

    name: str
    title: str
    tensor: int
    data: int
    tokens_a_step: int
    first_loss: float | None = None
    tokens_per_second: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    failure: str = ""


@dataclass
class Race:
    """The results of all trainers, and for each round the FLOP/s of one process in a large matrix product that all
    processes compute at once."""

    results: list[Result]
    matmul_flops: list[float]


class Team:
    """The processes of one trainer."""

    def __init__(self, contender: Contender, run: Run, world: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.members = []
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the started processes read this
        for rank in range(world):
            ours, theirs = context.Pipe()
            meeting_point = str(Path(self.folder.name) / "store")
            arguments = (contender.title, run, rank, world, threads, meeting_point, theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # this end is closed here, so that the pipe ends when the process dies
            self.members.append((process, ours))

    def ask(self, *question: Any) -> list[Any]:
        """The answers of all ranks to a question. Raises: RuntimeError if a rank fails."""
        try:
            for _, pipe in self.members:
                pipe.send(question)
        except OSError as error:
            raise RuntimeError("a process died") from error
        return self.answers()

    def answers(self) -> list[Any]:
        """Wait for all answers or the first failure. After a failure, the other ranks may hang in a collective."""
        answers: list[Any] = []
        missing = {pipe for _, pipe in self.members}
        while missing:
            ready = wait(list(missing), ANSWER_TIMEOUT)
            if not ready:
                raise RuntimeError(f"no answer within {ANSWER_TIMEOUT:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                missing.remove(pipe)
                try:
                    fine, answer = pipe.recv()
                except (EOFError, OSError) as error:
                    raise RuntimeError("a process died") from error
                if not fine:
                    raise RuntimeError(answer)
                answers.append(answer)
        return answers

    def dismiss(self) -> None:
        """End the processes. A process that hangs in a collective is killed."""
        for _, pipe in self.members:
            pipe.close()
        for process, _ in self.members:
            process.join(10.0)
            process.kill()
            process.join()
        self.folder.cleanup()


def race(names: list[str], run: Run, world: int, threads: int, steps: int, rounds: int) -> Race:
    """Measure `steps` optimizer steps of each trainer in each of `rounds` rounds. The order of the trainers rotates.

    `run.global_batch` is the batch of one data-parallel process. A trainer's batch is `run.global_batch` times the
    trainer's data-parallel degree."""
    results, teams = {}, {}
    for name in names:
        contender = CONTENDERS[name]
        tensor, data = contender.layout(run, world)
        tokens = run.batch_tokens * data
        refusal = contender.refuses(run, world)
        results[name] = Result(name, contender.title, tensor, data, tokens, failure=refusal and f"not run: {refusal}")
        if refusal:
            continue
        tell(f"starting {contender.title}")
        teams[name] = Team(contender, run, world, threads)
        try:
            results[name].first_loss = statistics.fmean(teams[name].answers())
        except RuntimeError as error:
            _fail(results[name], teams.pop(name), f"failed to start: {error}")
    product = Team(PRODUCT, run, world, threads)
    product.answers()
    matmul_flops = []
    for turn in range(rounds):
        matmul_flops.append(PRODUCTS * 2 * PRODUCT_SIZE[local_device().type] ** 3 / max(product.ask("steps", 1)))
        for name in sorted(teams, key=lambda each: (names.index(each) - turn) % len(names)):
            try:
                seconds = max(teams[name].ask("steps", steps))
            except RuntimeError as error:
                _fail(results[name], teams.pop(name), f"failed in round {turn + 1}: {error}")
                continue
            rate = steps * results[name].tokens_a_step / seconds
            results[name].tokens_per_second.append(rate)
            tell(f"round {turn + 1}/{rounds}: {results[name].title} {rate:,.0f} tokens/s")
    for name, team in list(teams.items()):
        try:
            results[name].peak_memory_bytes = max(team.ask("memory"))
            team.dismiss()
        except RuntimeError as error:
            _fail(results[name], team, f"failed at the end: {error}")
    product.dismiss()
    return Race(list(results.values()), matmul_flops)


def _fail(result: Result, team: Team, failure: str) -> None:
    result.failure = failure
    team.dismiss()
    tell(f"{result.title} {failure}")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _work(title: str, run: Run, rank: int, world: int, threads: int, meeting_point: str, pipe: Connection) -> None:
    """Run a process of a trainer. The process builds the trainer, warms up, and answers questions until the pipe is
    closed."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    quiet_libraries()
    torch.set_num_threads(threads)
    torch.manual_seed(run.seed)
    contender = next(each for each in (*CONTENDERS.values(), PRODUCT) if each.title == title)
    try:
        device = _join(rank, world, meeting_point)
        _, data = contender.layout(run, world)
        step = contender.build(dataclasses.replace(run, batch=run.batch | {"global": run.global_batch * data}))
        losses = [step(number) for number in range(WARM_UP)]
        forget_peak_memory(device)
        pipe.send((True, losses[0]))
        done = WARM_UP
        while True:
            question, *arguments = pipe.recv()
            if question == "memory":
                pipe.send((True, peak_memory(device)))
                continue
            step(done)  # this step refills the caches and is not measured
            start = _now(device)
            for number in range(done + 1, done + 1 + arguments[0]):
                step(number)
            done += 1 + arguments[0]
            pipe.send((True, _now(device) - start))
    except EOFError:  # the main process closed the pipe after the last round
        atexit.register(os._exit, 0)  # at the very end, where torch would abort because its threads still run
    except BaseException as error:
        traceback.print_exc()
        pipe.send((False, f"{type(error).__name__}: {one_line(error)[:200]}"))


def _join(rank: int, world: int, meeting_point: str) -> torch.device:
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=FileStore(meeting_point, world), rank=rank, world_size=world)
    return device


def _now(device: torch.device) -> float:
    """The host's clock in seconds, read after synchronising the device and all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))
    return time.perf_counter()
