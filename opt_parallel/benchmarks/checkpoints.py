"""Measure saving and loading of a run's training state in our checkpoint format and in DeepSpeed's. The two checkpoint
formats take turns in the same engine and processes."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from opt_parallel.checkpoint.store import TOKENIZER, Store
from opt_parallel.config.output import CheckpointConfig
from opt_parallel.config.run import Run, RunConfig
from opt_parallel.data.samples.samples import Batch
from opt_parallel.engine import Engine
from opt_parallel.parallel.shard import logical_parameters, marked, random_source
from opt_parallel.parallel.topology import Topology
from opt_parallel.report.metrics import forget_peak_memory, peak_memory
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import quiet_libraries
from opt_parallel.zero import Fragment, base_optimizer, held_fragments

Rounds = dict[str, list[float]]

TOKENS = 16  # number of tokens of each data rank in the one training step, which creates the optimizer's moments


def measure(run: Run, processes: int, folder: Path, rounds: int) -> Rounds:
    """The values of each quantity, one for each round. Times are seconds of the slowest process, and sizes are the
    largest number of bytes of a process.

    Raises: UserError if a loaded state differs from the saved one."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            ranks = [pool.submit(_work, run, rank, processes, Path(temporary), rounds) for rank in range(processes)]
            measured = [rank.result() for rank in ranks]
    together = {name: zip(*(each[name] for each in measured), strict=True) for name in measured[0]}
    return {name: [max(values) for values in turns] for name, turns in together.items()}


def _work(run: Run, rank: int, world: int, folder: Path, rounds: int) -> Rounds:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    quiet_libraries()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / TOKENIZER).write_text(json.dumps({}))
    with Topology.open(run.parallel.tensor) as topology:
        run = dataclasses.replace(
            run,
            run=RunConfig("benchmark", str(folder / "ours")),
            checkpoint=CheckpointConfig(keep=2),
            batch={"global": topology.data.size, "micro": 1},
        )
        engine = Engine.build(run, topology, random_source(run.seed))
        ids = torch.arange(4, 4 + TOKENS).unsqueeze(0)
        engine.step([Batch(ids, ids, None, None, torch.tensor([topology.data.rank]))], Clock())
        bench = Bench(run, topology, engine, Store(run, topology, tokenizer), folder)
        measured: Rounds = {}
        for turn in range(rounds):
            for name, value in bench.turn(turn).items():
                measured.setdefault(name, []).append(value)
        bench.store.finish()
        engine.close()
    return measured


@dataclasses.dataclass
class Bench:
    """The part of the measurement that runs in one process."""

    run: Run
    topology: Topology
    engine: Engine
    store: Store
    folder: Path

    def turn(self, turn: int) -> dict[str, float]:
        """Run one round, in which both formats are saved and loaded. The order of the formats alternates between
        rounds."""
        sides = [self._ours, self._theirs]
        figures: dict[str, float] = {}
        for side in sides if turn % 2 else reversed(sides):
            figures |= side(turn)
        return figures

    @property
    def parameters(self) -> int:
        return logical_parameters(self.engine.wrapped.module)

    def _ours(self, turn: int) -> dict[str, float]:
        clock = Clock(turn + 1)
        begin = self._now()
        self.store.save(self.engine, clock)
        still = time.perf_counter() - begin
        self.store.wait()
        whole = self._now() - begin
        written = self.folder / "ours" / "checkpoints" / f"step-{clock.step}"
        size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
        before = self._forget()
        begin = self._now()
        checkpoint = self.store.find()
        checked = self._now()
        assert checkpoint is not None
        self.store.restore(self.engine, checkpoint)
        loaded = self._now()
        peak = self._peak()
        self._compare(before, "ours")
        return {
            "still": still, "whole": whole, "bytes": size / self.parameters, "check": checked - begin,
            "load": loaded - begin, "memory": peak,
        }  # fmt: skip

    def _theirs(self, turn: int) -> dict[str, float]:
        saved = self.folder / "theirs"
        if self.topology.is_main:
            shutil.rmtree(saved, ignore_errors=True)
        begin = self._now()
        with redirect_stdout(io.StringIO()):
            self.engine.wrapped.save_checkpoint(str(saved), tag="saved")
        self.topology.barrier()
        files = sorted(path for path in saved.rglob("*") if path.is_file())
        for path in files[self.topology.world.rank :: self.topology.world.size]:
            number = os.open(path, os.O_RDONLY)
            os.fsync(number)
            os.close(number)
        whole = self._now() - begin
        size = sum(path.stat().st_size for path in files)
        before = self._forget()
        begin = self._now()
        with redirect_stdout(io.StringIO()):
            self.engine.wrapped.load_checkpoint(str(saved), tag="saved")
        loaded = self._now() - begin
        peak = self._peak()
        self._compare(before, "DeepSpeed's")
        return {"their save": whole, "their load": loaded, "their memory": peak, "their bytes": size / self.parameters}

    def _now(self) -> float:
        """The host's clock in seconds, read after a barrier."""
        self.topology.barrier()
        return time.perf_counter()

    def _state(self) -> list[Tensor]:
        """This rank's training state, which is working weights, fp32 weights and moments."""
        held = [values for fragment in self._held() for values in fragment.tensors.values()]
        return held + [tensor.detach() for _, tensor, _ in marked(self.engine.wrapped.module)]

    def _held(self) -> list[Fragment]:
        data_rank, moments = self.topology.data.rank, self.engine.moments
        return list(held_fragments(self.engine.wrapped, self.run.zero.stage, data_rank, moments))

    def _forget(self) -> list[float]:
        """Zero the weights and delete the moments, as at the start of a run. Returns the sum of each tensor before it
        was zeroed."""
        sums = [float(values.double().sum()) for values in self._state()]
        self.size = sum(values.nbytes for values in self._state())
        self.moments = sum(values.nbytes for fragment in self._held() for values in fragment.moments.values())
        base_optimizer(self.engine.wrapped).state.clear()
        for values in self._state():
            values.zero_()
        forget_peak_memory(self.topology.device)
        self.resident = peak_memory(self.topology.device)
        return sums

    def _peak(self) -> float:
        """Peak memory of loading, divided by the size of the training state. A value of 1 means no memory beyond the
        training state, to which the moments belong."""
        grown = peak_memory(self.topology.device) - self.resident
        return 1 + (grown - self.moments) / self.size

    def _compare(self, before: list[float], whose: str) -> None:
        if before != [float(values.double().sum()) for values in self._state()]:
            raise UserError(f"{whose} checkpoint did not restore the training state, so its times are meaningless")


def table(measured: Rounds) -> list[list[str]]:
    """The table of medians and ranges of all rounds, with the ratios of each round and their goals."""
    lines = [["", "ours (range)", "DeepSpeed (range)", "ours ÷ it (range)", "goal"]]

    for what, ours, theirs, goal in (
        ("saving, the loop stands still", "still", "their save", "≤ 0.15"),
        ("saving, until it is on the disk", "whole", "their save", "≤ 1.5"),
        ("loading, with the checksums", "load", "their load", "≤ 1.2"),
    ):
        ratios = [a / b for a, b in zip(measured[ours], measured[theirs], strict=True)]
        lines.append([what, _spread(measured[ours], " s"), _spread(measured[theirs], " s"), _spread(ratios), goal])
    lines.append(["  of that the checksums", _spread(measured["check"], " s"), "", "", ""])
    for what, name, theirs, goal in (
        ("peak while loading ÷ own state", "memory", "their memory", "≤ 1.1"),
        ("bytes on disk a parameter", "bytes", "their bytes", "≤ 12.5"),
    ):
        lines.append([what, _spread(measured[name]), _spread(measured[theirs]), "", goal])
    return lines


def _spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f}–{max(values):.2f})"
