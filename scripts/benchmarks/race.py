"""Contenders take turns: each has processes of its own that stay alive and wait while another's work.

So every round measures all of them within seconds of each other, on a machine that others may share, and what they
need to start, import and compile is not in the figures.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from benchmarks.contenders import CONTENDERS, DTYPES
from opt_parallel.config import Run
from opt_parallel.errors import one_line
from opt_parallel.log import quiet_libraries
from opt_parallel.metrics import peak_memory
from opt_parallel.topology import local_device

WARM_UP = 2  # steps before the first measured one: compiling, the allocator's first requests
PATIENCE = 1200.0  # seconds for one answer


@dataclass
class Result:
    """What one contender did. Rates are of all processes together, one a round; memory is of the fullest process."""

    name: str
    title: str
    tensor: int
    data: int
    first_loss: float | None = None
    tokens_per_second: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0
    failure: str = ""


@dataclass
class Race:
    """All results, and the rate of a large matrix product on all processes at once, FLOP/s of one process, a round."""

    results: list[Result]
    matmul_flops: list[float]


class Team:
    """One contender's processes."""

    def __init__(self, name: str, run: Run, world: int, threads: int, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.meeting_point = tempfile.mkdtemp()
        self.members = []
        with _environment({"OMP_NUM_THREADS": str(threads), **environment}):
            for rank in range(world):
                ours, theirs = context.Pipe()
                arguments = (name, run, rank, world, threads, self.meeting_point, theirs)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()  # so that a process that died reads as the end of the pipe
                self.members.append((process, ours))

    def ask(self, *question: Any) -> list[Any]:
        """Every rank's answer. Raises: RuntimeError if one fails."""
        for _, pipe in self.members:
            pipe.send(question)
        return self.answers()

    def answers(self) -> list[Any]:
        answers: list[Any] = []
        failures: list[str] = []
        for _, pipe in self.members:
            try:
                fine, answer = pipe.recv() if pipe.poll(PATIENCE) else (False, f"no answer within {PATIENCE:.0f} s")
            except EOFError:
                fine, answer = False, "its process died"
            (answers if fine else failures).append(answer)
        if failures:
            raise RuntimeError(failures[0])
        return answers

    def dismiss(self) -> None:
        """End the processes; one that hangs in a collective is killed."""
        for _, pipe in self.members:
            pipe.close()
        for process, _ in self.members:
            process.join(10.0)
            process.kill()


def race(names: list[str], run: Run, world: int, threads: int, steps: int, rounds: int, huge_pages: bool) -> Race:
    """`rounds` times `steps` optimizer steps of each contender, in an order that turns with the rounds."""
    results, teams = [], {}
    for name in names:
        contender = CONTENDERS[name]
        tensor, data = contender.layout(run, world)
        result = Result(name, contender.title, tensor, data, failure=contender.refuses(run, world))
        results.append(result)
        if result.failure:
            continue
        _tell(f"starting {contender.title}")
        environment = dict(contender.environment) | ({"THP_MEM_ALLOC_ENABLE": "1"} if huge_pages else {})
        teams[name] = Team(name, run, world, threads, environment)
        try:
            result.first_loss = statistics.fmean(teams[name].answers())
        except RuntimeError as error:
            _fail(result, teams.pop(name), error)
    matmul_flops: list[float] = []
    for turn in range(rounds):
        for name in sorted(teams, key=lambda each: (names.index(each) - turn) % len(names)):
            result = next(each for each in results if each.name == name)
            try:
                if len(matmul_flops) <= turn:  # once a round, by whoever is first
                    matmul_flops.append(min(teams[name].ask("matmul")))
                seconds = max(teams[name].ask("steps", steps))
            except RuntimeError as error:
                _fail(result, teams.pop(name), error)
                continue
            tokens = steps * run.micro_batch * result.data * run.data.sequence_length
            result.tokens_per_second.append(tokens * _accumulation(run) / seconds)
            _tell(f"round {turn + 1}/{rounds}: {result.title} {result.tokens_per_second[-1]:,.0f} tokens/s")
    for result in results:
        if result.name in teams:
            result.peak_memory_bytes = max(teams[result.name].ask("memory"))
            teams[result.name].dismiss()
    return Race(results, matmul_flops)


def batch_of(run: Run, data: int) -> int:
    """The global batch of a contender with `data` data-parallel processes: each takes as many micro-batches as ours."""
    return run.micro_batch * data * _accumulation(run)


def _accumulation(run: Run) -> int:
    return run.global_batch // run.micro_batch


def _fail(result: Result, team: Team, error: RuntimeError) -> None:
    result.failure = str(error)
    team.dismiss()
    _tell(f"{result.title} failed: {result.failure}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """What processes started inside inherit."""
    before = dict(os.environ)
    os.environ.update(changes)
    yield
    os.environ.clear()
    os.environ.update(before)


def _work(name: str, run: Run, rank: int, world: int, threads: int, meeting_point: str, pipe: Connection) -> None:
    """A process of a team: build, warm up, then answer until it is ended."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    quiet_libraries()
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(run.seed)
        member = _Member(name, run, rank, world, meeting_point)
        step = CONTENDERS[name].build(member.run)
        first_loss = step(0)
        for number in range(1, WARM_UP):
            step(number)
        member.reset_peak_memory()
        pipe.send((True, first_loss))
        done = WARM_UP
        while True:
            question, *arguments = pipe.recv()
            if question == "steps":
                start = member.now()
                for number in range(done, done + arguments[0]):
                    step(number)
                done += arguments[0]
                pipe.send((True, member.now() - start))
            else:
                pipe.send((True, member.matmul_flops() if question == "matmul" else member.peak_memory()))
    except EOFError:  # the race is over
        return
    except BaseException as error:
        traceback.print_exc()
        pipe.send((False, f"{type(error).__name__}: {one_line(error)[:200]}"))


class _Member:
    """This process's place in the group, its device and its clocks."""

    def __init__(self, name: str, run: Run, rank: int, world: int, meeting_point: str) -> None:
        self.device = local_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        _, data = CONTENDERS[name].layout(run, world)
        self.run = dataclasses.replace(run, batch={"global": batch_of(run, data), "micro": run.micro_batch})
        store = FileStore(str(Path(meeting_point) / "store"), world)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    def now(self) -> float:
        """Seconds, once the device has done what it was given and every rank is here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))
        return time.perf_counter()

    def matmul_flops(self) -> float:
        """FLOP/s of square products in the run's precision: what this process could reach at best."""
        size = 8192 if self.device.type == "cuda" else 2048
        matrix = torch.randn(size, size, device=self.device).to(DTYPES[self.run.precision.name])
        matrix @ matrix
        rates = []
        for _ in range(5):
            start = self.now()
            for _ in range(4):
                matrix @ matrix
            rates.append(4 * 2 * size**3 / (self.now() - start))
        return statistics.median(rates)

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        """Most bytes since the warm-up: of tensors on a GPU, else of the whole process."""
        return peak_memory(self.device)
