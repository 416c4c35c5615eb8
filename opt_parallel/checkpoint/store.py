"""The checkpoints of a run: save, find the newest, resume, keep the last few.

`checkpoints/step-<N>/` is written under a temporary name and renamed once all ranks are done: whole or absent.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from opt_parallel.checkpoint.reshard import weights_file
from opt_parallel.clock import Clock
from opt_parallel.compose import to_dict
from opt_parallel.config import Run
from opt_parallel.engine import Engine
from opt_parallel.errors import UserError
from opt_parallel.manifest import MANIFEST, read_manifest
from opt_parallel.shapes import MAY_DIFFER
from opt_parallel.topology import Topology

TOKENIZER = "tokenizer.json"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, None if its name or content says that it is none (or not whole)."""
    prefix, _, number = folder.name.partition("-")
    whole = prefix == "step" and number.isdigit() and (folder / MANIFEST).is_file()
    return int(number) if whole else None


def steps_in(checkpoints: Path) -> list[int]:
    """The steps of the whole checkpoints, oldest first."""
    return sorted(step for folder in checkpoints.glob("step-*") if (step := step_of(folder)) is not None)


def newest(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step."""
    steps = steps_in(checkpoints)
    return checkpoints / f"step-{steps[-1]}" if steps else None


def choose(run: Run) -> Path | None:
    """The checkpoint that `resume` asks for, None for a fresh start.

    Raises: UserError if it does not exist, or `never` would mix a new run with an old one."""
    last = newest(run.folder / "checkpoints")
    if run.resume == "auto":
        return last
    if run.resume == "never":
        if last is not None:
            raise UserError(
                f"resume=never, but {last} exists: a new run there would mix with the old one; "
                "choose another run.dir or remove the folder"
            )
        return None
    chosen = Path(run.resume)
    if step_of(chosen) is None:
        raise UserError(f"resume={run.resume} is no whole checkpoint: choose auto, never or a folder …/step-<N>")
    return chosen


class Store:
    """Saves and restores a run's state; every rank calls its methods together."""

    def __init__(self, run: Run, topology: Topology, tokenizer: Path) -> None:
        self.run, self.topology, self.tokenizer = run, topology, tokenizer
        self.root = run.folder / "checkpoints"

    def resume(self, engine: Engine) -> Clock:
        """Load the checkpoint that `resume` asks for; the clock it stopped at.

        Raises: UserError if it was written in another layout or for another shape."""
        folder = choose(self.run)
        if folder is None:
            return Clock()
        manifest = read_manifest(folder)
        self._check_fits(folder, manifest)
        engine.load(folder / "deepspeed")
        clock = Clock(**manifest["clock"])
        self.topology.barrier()
        if self.topology.is_main:
            self._set_aside_after(clock.step)
        return clock

    def save(self, engine: Engine, clock: Clock) -> Path:
        """Write `step-<N>`; of older ones only the newest `checkpoint.keep` − 1 stay."""
        final, partial = self.root / f"step-{clock.step}", self.root / f"step-{clock.step}.partial"
        if self.topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.topology.barrier()
        engine.save(partial / "deepspeed")
        tensors = self._write_weights(engine, partial)
        self.topology.barrier()
        if self.topology.is_main:
            shutil.copytree(self.tokenizer, partial / "tokenizer")
            self._write_manifest(partial, clock, tensors)
            os.replace(partial, final)
            self._forget_old()
        self.topology.barrier()
        return final

    def _write_weights(self, engine: Engine, folder: Path) -> dict[str, dict[str, Any]]:
        """This tensor rank's part of each weight, written by the first data rank; all of them are described."""
        writes = self.topology.data.rank == 0
        tensors, held = {}, {}
        for name, shard, values in engine.weights():
            tensors[name] = {"shape": list(shard.shape), "dim": shard.dim, "count": shard.count}
            if writes and (shard.count > 1 or self.topology.tensor.rank == 0):
                held[name] = values.to("cpu").contiguous()
        if writes:
            save_file(held, folder / weights_file(self.topology.tensor.rank), metadata={"format": "pt"})
        return tensors

    def _write_manifest(self, folder: Path, clock: Clock, tensors: dict[str, dict[str, Any]]) -> None:
        manifest = {
            "clock": asdict(clock),
            "layout": self._layout(),
            "config": to_dict(self.run),
            "tensors": tensors,
        }
        with open(folder / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _layout(self) -> dict[str, Any]:
        return {
            "parallel.tensor": self.topology.tensor.size,
            "data-parallel size": self.topology.data.size,
            "zero.stage": self.run.zero.stage,
            "zero.offload": self.run.zero.offload.value,
            "precision": self.run.precision.name.value,
        }

    def _check_fits(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise UserError unless this run's network, tokenizer and layout are the checkpoint's."""
        saved, now = manifest["config"]["model"], to_dict(self.run)["model"]
        for name in now:
            if name not in MAY_DIFFER and saved.get(name) != now[name]:
                raise UserError(
                    f"{folder} was trained with model.{name}={saved.get(name)}, this run has {now[name]}: another "
                    "network cannot continue it; set the value back, or start in another run.dir"
                )
        if not filecmp.cmp(folder / "tokenizer" / TOKENIZER, self.tokenizer / TOKENIZER, shallow=False):
            raise UserError(
                f"{folder} was trained with another tokenizer than {self.tokenizer}, whose ids mean other words: set "
                f"data.tokenizer={folder / 'tokenizer'}, or start in another run.dir"
            )
        for what, value in self._layout().items():
            if manifest["layout"][what] != value:
                raise UserError(
                    f"{folder} was saved with {what} {manifest['layout'][what]}, this run has {value}: resume in the "
                    "same layout, or start a new run in another run.dir"
                )

    def _set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps: the run branches off here, and `auto` must not find them."""
        for later in steps_in(self.root):
            if later > step:
                taken = len(list(self.root.glob(f"step-{later}.abandoned*")))
                os.replace(self.root / f"step-{later}", self.root / f"step-{later}.abandoned{taken or ''}")

    def _forget_old(self) -> None:
        for step in steps_in(self.root)[: -self.run.checkpoint.keep]:
            folder = self.root / f"step-{step}"
            (folder / MANIFEST).unlink()  # first: half a deletion leaves nothing that looks whole
            shutil.rmtree(folder)
