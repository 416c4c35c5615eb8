"""The checkpoints of a run: save while training goes on, find the newest that is whole, resume in any layout.

`checkpoints/step-<N>/` is written under a temporary name and renamed once all ranks are done: whole or absent.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

from opt_parallel.checkpoint.damage import read_share
from opt_parallel.checkpoint.folders import (
    BEST,
    any_number,
    best_in,
    choose,
    forget_old,
    misnamed_in,
    newest,
    partial_of,
    renew_best,
    set_aside,
    step_of,
    steps_in,
    torn_in,
    write_best,
)
from opt_parallel.checkpoint.lora import Base, lora_of
from opt_parallel.checkpoint.manifest import FORMAT, MANIFEST, changes
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.replicas import differing
from opt_parallel.checkpoint.writer import Saver
from opt_parallel.config.compose import recorded, to_dict
from opt_parallel.config.model import MAY_DIFFER, Labels
from opt_parallel.config.paths import absolute, change_paths
from opt_parallel.config.run import Run
from opt_parallel.engine import Engine
from opt_parallel.model.build import network
from opt_parallel.parallel.shard import trained_shapes
from opt_parallel.parallel.topology import ALONE, Topology
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import aligned, say
from opt_parallel.storage.atomic import PARTIAL, optional, publish
from opt_parallel.storage.checked import dump_checked

TOKENIZER = "tokenizer.json"
RECORDED = ("opt-parallel", "torch", "deepspeed", "tokenizers")  # what a run's numbers may depend on
NOT_TOLD = {"resume", "stop_at"}  # settings of one process, not of the run


class Store:
    """Saves and restores a run's state; every rank calls its methods together."""

    def __init__(
        self,
        run: Run,
        topology: Topology,
        tokenizer: Path,
        labels: Labels | None = None,
        base: Base | None = None,
        text: Mapping[str, str] | None = None,
        wandb_id: str | None = None,
    ) -> None:
        """`labels` are a classifier's; `base` is what a LoRA run stands on; `text`: each source's prepared store;
        `wandb_id`: the run's name at wandb, which rank 0 knows."""
        self.run, self.topology, self.tokenizer = run, topology, tokenizer
        # in memory: a checkpoint can be written when data.cache is gone
        self.tokenizer_files = {path.name: path.read_bytes() for path in sorted(tokenizer.iterdir())}
        self.labels, self.base, self.text = labels, base, dict(text or {})
        self.wandb_id = wandb_id
        self.root = run.folder / "checkpoints"
        self.saver = Saver(topology)
        self.saving: Path | None = None  # what the saver was last given

    def find(self) -> CheckpointReader | None:
        """The checkpoint that `resume` asks for, all its files checked; None for a fresh start.

        A damaged one is named, set aside, and the one before it taken. Raises: UserError if none is left, if
        `resume` names it, or if it is of another network or tokenizer."""
        self._on_main(self._set_torn_aside)
        folder = self._first_ranks(choose(self.run))
        while folder is not None:
            found = self._open(folder)
            if isinstance(found, CheckpointReader):
                return found
            damage = found
            if self.run.resume != "auto":
                raise UserError(f"resume={folder}: {damage}; choose an earlier checkpoint")
            self.topology.barrier()  # everybody has looked
            self._on_main(partial(self._set_damaged_aside, folder, damage))
            folder = self._first_ranks(newest(self.root))
            if folder is None:
                raise UserError(f"{self.root} holds no whole checkpoint any more: choose another run.dir to begin anew")
        return None

    def restore(self, engine: Engine, reader: CheckpointReader) -> Clock:
        """Bring the engine to where the checkpoint was written; what the configuration says now wins over what it said
        then, and what differs is said."""
        manifest = reader.manifest
        engine.restore(reader.restore, manifest["updates"], manifest["loss_scale"])
        clock = Clock.saved(manifest["clock"])
        self.topology.barrier()
        self._on_main(partial(self._branch_off, manifest))
        return clock

    def if_best(self, loss: float | None) -> float | None:
        """The validation `loss` if it is below that of every checkpoint so far and the run keeps the best, else None.
        Waits for what is being written."""
        if not self.run.checkpoint.keep_best or loss is None:
            return None
        self.wait()
        known = best_in(self.root) if self.topology.is_main else None
        better = math.isfinite(loss) and (known is None or loss < known["loss"])
        return loss if self.topology.any(self.topology.is_main and better) else None

    def save(self, engine: Engine, clock: Clock, best: float | None = None) -> None:
        """Write `step-<N>`, which goes on while training does; waits for the one before, and says if that failed.

        `best` is its validation loss where that is the lowest so far. Raises: UserError, on every rank and with nothing
        written, where ranks hold different values of what must be the same."""
        self.wait()
        final = self.root / f"step-{clock.step}"
        self._check_replicas(engine, final)
        self.saving, number, failure = final, 0, "rank 0 could not write"
        if self.topology.is_main:
            try:
                number = any_number()
                partial_of(final, number).mkdir(parents=True)
            except OSError as error:
                number, failure = -1, error.strerror or str(error)
        number = self.topology.sum(number, self.topology.world)  # rank 0's
        if number < 0:
            self.saver.failure = failure
        else:
            beside, manifest = partial_of(final, number), self._manifest(engine, clock)
            complete = partial(self._complete, beside, final, manifest)
            self.saver.start(engine.owned(), beside, complete, partial(self._tidy_up, clock.step, best))
        if not self.run.checkpoint.asynchronous:
            self.saver.join()  # whether it failed is for the next save to say, or for the end to fail with

    def _check_replicas(self, engine: Engine, final: Path) -> None:
        wrong = differing(engine.replicas(), self.topology)
        if wrong is not None:
            kept = self.topology.exchange(newest(self.root))[0]  # as rank 0 sees it
            raise UserError(
                f"{final} is not saved: {wrong}, which must be the same: a memory, a device or the network changed "
                f"them. The same command goes on from {kept or 'the beginning'}; take the host out of service if it "
                "happens again",
                shared=True,
            )

    def wait(self) -> None:
        """Until what is being written is on the disk; says if that failed."""
        failure = self.saver.wait()
        if failure is not None:
            left = any(self.root.glob(f"{self.saving.name}{PARTIAL}*")) if self.saving else False
            rest = "what is left of it is deleted later" if left else "and nothing of it is left"
            say(f"warning: {self.saving} could not be written ({failure}), {rest}")

    def finish(self) -> None:
        """Wait for what is still being written. Raises: UserError if the last checkpoint failed."""
        failure = self.saver.wait()
        self.saver.close()
        if failure is not None:
            kept = newest(self.root)
            raise UserError(
                f"{self.saving} could not be written ({failure}): make room there and start the same command again; "
                + (f"{kept} is whole" if kept else "there is no earlier checkpoint")
            )

    def rescue(self, engine: Engine, clock: Clock) -> str:
        """Save, unless this step is saved, before an end that training is not to blame for; where the same command goes
        on, in words."""
        self.wait()
        final = self.root / f"step-{clock.step}"
        if clock.step and self.topology.any(self.topology.is_main and step_of(final) is None):
            self.save(engine, clock)
            self.wait()
        return f"the same command goes on from {newest(self.root) or 'the beginning'}"

    def _on_main(self, work: Callable[[], None]) -> None:
        """Raises: UserError on every rank, if rank 0 does."""
        self.topology.together(lambda: work() if self.topology.is_main else None)

    def _set_torn_aside(self) -> None:
        for torn in torn_in(self.root):  # it would be in the way of a save
            say(f"warning: {torn} has no {MANIFEST}; it is set aside as {set_aside(torn, 'damaged').name}")
        for path in misnamed_in(self.root):
            say(f"warning: {path} is not the name of a checkpoint (step-<N>, such as step-2); it is left alone")

    def _set_damaged_aside(self, folder: Path, damage: str) -> None:
        say(f"warning: {folder}: {damage}; it is set aside as {set_aside(folder, 'damaged').name}")

    def _branch_off(self, manifest: dict[str, Any]) -> None:
        """Say what has changed since the checkpoint; what is later is no longer the run's."""
        self._tell_changes(manifest)
        for later in steps_in(self.root):
            if later > manifest["clock"]["step"]:  # `auto` must not find them
                set_aside(self.root / f"step-{later}", "abandoned")
        renew_best(self.root, self.run.checkpoint.keep_best)

    def _complete(self, beside: Path, final: Path, manifest: dict[str, Any]) -> None:
        """On the first rank, once all files are on the disk: manifest, tokenizer, and the name."""
        for note in sorted(beside.glob("rank-*.json")):
            manifest["files"][f"{note.stem}.safetensors"] = json.loads(note.read_text())
            note.unlink()
        (beside / "tokenizer").mkdir()
        for name, content in self.tokenizer_files.items():
            (beside / "tokenizer" / name).write_bytes(content)
            written = {"bytes": len(content), "crc32": f"{crc32(content):08x}", "fragments": []}
            manifest["files"][f"tokenizer/{name}"] = written
        (beside / MANIFEST).write_text(dump_checked(manifest))
        publish(beside, final)

    def _tidy_up(self, step: int, best: float | None) -> None:
        """Once the checkpoint is there, which none of this changes: name the best, make room for the next."""
        if best is not None:
            with optional(self.root / BEST):
                write_best(self.root, step, best)
        forget_old(self.root, self.run.checkpoint.keep, self.run.checkpoint.keep_every)

    def _first_ranks(self, folder: Path | None) -> Path | None:
        """The first rank's choice: on a shared file system others may not see the newest yet."""
        if self.run.resume != "auto":
            return folder
        step = -1 if folder is None else step_of(folder)
        assert step is not None
        step = self.topology.sum(step if self.topology.is_main else 0, self.topology.world)
        return None if step < 0 else self.root / f"step-{step}"

    def _manifest(self, engine: Engine, clock: Clock) -> dict[str, Any]:
        manifest = {
            "format": FORMAT,
            "clock": asdict(clock),
            "updates": engine.updates,
            "loss_scale": None if engine.scaler is None else engine.scaler.state(),
            "layout": {
                "world size": self.topology.world.size,
                "tensor": self.topology.tensor.size,
                "data": self.topology.data.size,
                "zero.stage": self.run.zero.stage,
                "zero.offload": self.run.zero.offload.value,
                "precision": self.run.precision.name.value,
            },
            "versions": self._versions(),
            "config": recorded(self.run),
            "text": self.text,
            "base": None if self.base is None else asdict(self.base),
            "tensors": engine.tensors(),
            "files": {},
        }
        if self.labels is not None:
            manifest["labels"] = _labels_as_json(self.labels)
        if self.wandb_id is not None:
            manifest["wandb_id"] = self.wandb_id
        return manifest

    def _open(self, folder: Path) -> CheckpointReader | str:
        """A checkpoint, or what is wrong with it: each rank checks a share of the files.

        Raises: UserError if it is whole, but of another network or tokenizer than this run's."""
        reader, wrong = read_share(folder, self.topology.world.rank, self.topology.world.size)
        for found in self.topology.exchange(wrong):
            if found:
                return found[0]
        assert reader is not None
        self._check_fits(folder, reader.manifest)
        wanted = trained_shapes(network(self.run, self.labels, ALONE))
        return reader if reader.shapes == wanted else f"{MANIFEST} lists tensors of other shapes than the network's"

    def _check_fits(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise UserError unless this run's network and tokenizer are the checkpoint's."""
        saved, now = manifest["config"]["model"], to_dict(self.run)["model"]
        for name in now:
            if name not in MAY_DIFFER and saved.get(name) != now[name]:
                raise UserError(
                    f"{folder} was trained with model.{name}={saved.get(name)}, this run has {now[name]}: another "
                    "network cannot continue it; set the value back, or start in another run.dir"
                )
        self._check_labels(folder, manifest.get("labels"))
        self._check_adapts(folder, manifest)
        if (folder / "tokenizer" / TOKENIZER).read_bytes() != self.tokenizer_files[TOKENIZER]:
            raise UserError(
                f"{folder} was trained with another tokenizer than {self.tokenizer}, whose ids mean other words: set "
                f"data.tokenizer={folder / 'tokenizer'}, or start in another run.dir"
            )

    def _check_labels(self, folder: Path, saved: dict[str, Any] | None) -> None:
        """Raise UserError unless both are language models, or both tell the same labels apart."""
        now = None if self.labels is None else _labels_as_json(self.labels)
        if saved != now:
            raise UserError(
                f"{folder} is {_as_words(saved)}, this run trains {_as_words(now)}: set task or task.labels back, or "
                f"start in another run.dir with init_from={folder}"
            )

    def _check_adapts(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise UserError unless both train everything, or both the same low-rank terms on the same base."""
        then, now = lora_of(manifest), self.run.task.lora
        if then.rank == now.rank == 0:
            return
        for name, saved, given in (
            ("rank", then.rank, now.rank),
            ("targets", sorted(then.targets), sorted(now.targets)),
            ("alpha", then.alpha, now.alpha),  # the same A and B would be other weights
        ):
            if saved != given:
                raise UserError(
                    f"{folder} was trained with task.lora.{name}={saved}, this run has {given}: another network cannot "
                    f"continue it; set the value back, or start in another run.dir with init_from={folder}"
                )
        assert self.base is not None
        if manifest["base"]["checksum"] != self.base.checksum:
            raise UserError(
                f"{folder} adapts {manifest['base']['checkpoint']} (checksum {manifest['base']['checksum']}), and "
                f"init_from={self.run.init_from} has other weights (checksum {self.base.checksum}): set init_from "
                "back, or start in another run.dir"
            )

    def _tell_changes(self, manifest: dict[str, Any]) -> None:
        """A table of settings and libraries that differ from the checkpoint's."""
        change_paths(manifest["config"], Run, absolute)  # older ones have them as they were typed
        then = manifest["config"] | manifest["versions"] | {"text": manifest.get("text", self.text)}
        now = recorded(self.run) | self._versions() | {"text": self.text}
        rows = [row for row in changes(then, now) if row[0] not in NOT_TOLD]
        if rows:
            say("changed since the checkpoint:")
            for line in aligned([["", "then", "now"], *rows]).split("\n"):
                say(f"  {line}")

    def _versions(self) -> dict[str, str]:
        return {"python": platform.python_version(), **{name: version(name) for name in RECORDED}}


def _labels_as_json(labels: Labels) -> dict[str, Any]:
    return {"names": list(labels.names), "problem_type": labels.problem_type and labels.problem_type.value}


def _as_words(labels: dict[str, Any] | None) -> str:
    if labels is None:
        return "a language model"
    names = labels["names"]
    return f"a classifier of {', '.join(names[:5])}{', …' if len(names) > 5 else ''} ({labels['problem_type']})"
