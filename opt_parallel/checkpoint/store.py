"""Saves the checkpoints of a run while training continues, finds the newest checkpoint, and restores its state.

A checkpoint is written under a temporary name, and is renamed to `checkpoints/step-<N>/` when all ranks have written
their files. So a folder with this name is always complete. A checkpoint can be restored with another number of ranks.
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

import torch

from opt_parallel.checkpoint.damage import read_share
from opt_parallel.checkpoint.folders import (
    BEST,
    best_in,
    choose,
    forget_old,
    misnamed_in,
    newest,
    partial_of,
    random_number,
    renew_best,
    retire,
    step_of,
    steps_in,
    without_manifest,
    write_best,
)
from opt_parallel.checkpoint.fragments import TABLES, write_tables
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
from opt_parallel.optim import saved_optimizer
from opt_parallel.parallel.precision import device_model
from opt_parallel.parallel.shard import trained_shapes
from opt_parallel.parallel.topology import ALONE, Topology
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.log import aligned, say
from opt_parallel.storage.atomic import PARTIAL, optional, publish
from opt_parallel.storage.checked import dump_checked

TOKENIZER = "tokenizer.json"
RECORDED = ("opt-parallel", "torch", "deepspeed", "tokenizers")  # Results may depend on the versions of these packages.
NOT_COMPARED = {"resume", "stop_at"}  # Settings that may change at each start of a run.


class Store:
    """Saves and restores the state of a run in checkpoints. All ranks must call the methods together."""

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
        """Prepare to save checkpoints of `run`.

        Args:
            tokenizer: the folder of the run's tokenizer.
            labels: the labels of a classifier.
            base: the base checkpoint of a LoRA run.
            text: an identifier of the text of each source.
            wandb_id: the id of the run at wandb, on rank 0.
        """
        self.run, self.topology, self.tokenizer = run, topology, tokenizer
        # The files are kept in memory, so that a checkpoint can be written after data.cache was removed.
        self.tokenizer_files = {path.name: path.read_bytes() for path in sorted(tokenizer.iterdir())}
        self.labels, self.base, self.text = labels, base, dict(text or {})
        self.wandb_id = wandb_id
        self.device = ", ".join(sorted({*topology.exchange(device_model(topology.device))}))
        self.root = run.folder / "checkpoints"
        self.saver = Saver(topology)
        self.saving: Path | None = None  # the folder of the last checkpoint that was passed to the saver

    def find(self) -> CheckpointReader | None:
        """The checkpoint that the setting `resume` names, or None for a new run. The checkpoint's files are checked.

        With `resume=auto`, a damaged checkpoint is reported and renamed, and the previous checkpoint is used. Raises:
        UserError if no checkpoint is left, if `resume` names a damaged checkpoint, or if the network, optimizer or
        tokenizer of the checkpoint differs from the run's."""
        self._on_main(self._retire_incomplete)
        folder = self._first_ranks(choose(self.run.resume, self.run.folder))
        while folder is not None:
            found = self._open(folder)
            if isinstance(found, CheckpointReader):
                return found
            damage = found
            if self.run.resume != "auto":
                raise UserError(f"resume={folder}: {damage}; choose an earlier checkpoint")
            self.topology.barrier()  # waits until no rank reads the damaged checkpoint
            self._on_main(partial(self._retire_damaged, folder, damage))
            folder = self._first_ranks(newest(self.root))
            if folder is None:
                raise UserError(f"{self.root} has no complete checkpoint left: choose another run.dir to start again")
        return None

    def restore(self, engine: Engine, reader: CheckpointReader) -> None:
        """Set the engine to the state of the checkpoint.

        The run keeps its present configuration. The differences from the checkpoint's configuration are printed."""
        manifest = reader.manifest
        engine.restore(reader.restore, manifest["updates"], manifest["loss_scale"])
        self.topology.barrier()
        self._on_main(partial(self._branch_off, manifest))

    def if_best(self, loss: float | None) -> float | None:
        """The validation `loss` if it is lower than that of all checkpoints so far, else None.

        The result is also None if the run does not keep its best checkpoint. The method waits for a save in progress.
        """
        if not self.run.checkpoint.keep_best or loss is None:
            return None
        self.wait()
        known = best_in(self.root) if self.topology.is_main else None
        better = math.isfinite(loss) and (known is None or loss < known["loss"])
        return loss if self.topology.any(self.topology.is_main and better) else None

    def save(self, engine: Engine, clock: Clock, best: float | None = None) -> None:
        """Write the checkpoint `step-<N>` in the background, after the previous save has ended.

        A warning is printed if the previous save failed. `best` is the validation loss if it is the lowest so far.
        Raises: UserError on every rank, before a file is written, if values that should be equal on all ranks differ.
        """
        self.wait()
        final = self.root / f"step-{clock.step}"
        self._check_replicas(engine, final)
        self.saving, number, failure = final, 0, "rank 0 could not write"
        if self.topology.is_main:
            try:
                number = random_number()
                partial_of(final, number).mkdir(parents=True)
            except OSError as error:
                number, failure = -1, error.strerror or str(error)
        number = self.topology.sum(number, self.topology.world)  # the number of rank 0, because all others are 0
        if number < 0:
            self.saver.failure = failure
        else:
            beside, manifest = partial_of(final, number), self._manifest(engine, clock)
            complete = partial(self._complete, beside, final, manifest)
            names, tidy_up = sorted(manifest["tensors"]), partial(self._tidy_up, clock.step, best)
            self.saver.start(engine.owned(), names, beside, complete, tidy_up)
        if not self.run.checkpoint.asynchronous:
            self.saver.join()  # `wait` or `finish` reports a failed save

    def _check_replicas(self, engine: Engine, final: Path) -> None:
        wrong = differing(engine.replicas(), self.topology)
        if wrong is not None:
            kept = self.topology.exchange(newest(self.root))[0]  # the newest checkpoint that rank 0 finds
            raise UserError(
                f"{final} is not saved: {wrong}, but these values must be equal: a memory, a device or the network "
                f"changed a value. The same command {_resumes_from(kept)}; if this happens again, do not use the host",
                shared=True,
            )

    def wait(self) -> None:
        """Wait for a save in progress, and print a warning if the save failed."""
        failure = self.saver.wait()
        if failure is not None:
            left = any(self.root.glob(f"{self.saving.name}{PARTIAL}*")) if self.saving else False
            rest = "will be deleted later" if left else "were deleted"
            say(f"warning: {self.saving} could not be written ({failure}); its partial files {rest}")

    def finish(self) -> None:
        """Wait for a save in progress. Raises: UserError if the save failed."""
        failure = self.saver.wait()
        self.saver.close()
        if failure is not None:
            kept = newest(self.root)
            raise UserError(
                f"{self.saving} could not be written ({failure}): free space on this disk and repeat the command; "
                + (f"{kept} is complete" if kept else "there is no earlier checkpoint")
            )

    def rescue(self, engine: Engine, clock: Clock) -> str:
        """Save a checkpoint of this step, unless it exists, before the run ends because of an external cause.

        The method returns the end of a message, which says from which step the same command resumes."""
        self.wait()
        final = self.root / f"step-{clock.step}"
        if clock.step and self.topology.any(self.topology.is_main and step_of(final) is None):
            self.save(engine, clock)
            self.wait()
        return f"the same command {_resumes_from(newest(self.root))}"

    def _on_main(self, work: Callable[[], None]) -> None:
        """Call `work` on rank 0. Raises: UserError on every rank, if `work` raises it."""
        self.topology.together(lambda: work() if self.topology.is_main else None)

    def _retire_incomplete(self) -> None:
        for folder in without_manifest(self.root):  # a later save of the same step needs the folder's name
            say(f"warning: {folder} has no {MANIFEST}; it is renamed to {retire(folder, 'damaged').name}")
        for path in misnamed_in(self.root):
            say(f"warning: {path} is not the name of a checkpoint (step-<N>, such as step-2), and is ignored")

    def _retire_damaged(self, folder: Path, damage: str) -> None:
        say(f"warning: {folder}: {damage}; it is renamed to {retire(folder, 'damaged').name}")

    def _branch_off(self, manifest: dict[str, Any]) -> None:
        """Print the settings that have changed since the checkpoint, and rename all later checkpoints.

        The later checkpoints no longer belong to the run, which repeats their steps."""
        self._print_changes(manifest)
        for later in steps_in(self.root):
            if later > manifest["clock"]["step"]:  # `resume=auto` must not find the later checkpoints
                retire(self.root / f"step-{later}", "abandoned")
        renew_best(self.root, self.run.checkpoint.keep_best)

    def _complete(self, beside: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Write the tables, the tokenizer and the manifest, and rename the folder, on rank 0.

        All ranks have written their files before."""
        files, tables = manifest["files"], {}
        for note in sorted(beside.glob("rank-*.json")):
            file = f"{note.stem}.safetensors"
            files[file] = json.loads(note.read_text())
            tables[file] = files[file].pop("table")
            note.unlink()
        files[TABLES] = write_tables(beside / TABLES, tables)
        (beside / "tokenizer").mkdir()
        for name, content in self.tokenizer_files.items():
            (beside / "tokenizer" / name).write_bytes(content)
            files[f"tokenizer/{name}"] = {"bytes": len(content), "crc32": f"{crc32(content):08x}"}
        (beside / MANIFEST).write_text(dump_checked(manifest))
        publish(beside, final)

    def _tidy_up(self, step: int, best: float | None) -> None:
        """Write best.json and delete old checkpoints, after the checkpoint of `step` is complete."""
        if best is not None:
            with optional(self.root / BEST):
                write_best(self.root, step, best)
        forget_old(self.root, self.run.checkpoint.keep, self.run.checkpoint.keep_every)

    def _first_ranks(self, folder: Path | None) -> Path | None:
        """The folder that rank 0 chose. On a shared file system, other ranks may not see the newest folder yet."""
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
            "device": self.device,
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
        """A reader of the checkpoint, or a description of its damage. Each rank checks a share of the files.

        Raises: UserError if the checkpoint is complete, but has another network, optimizer or tokenizer than the run.
        """
        reader, wrong = read_share(folder, self.topology.world.rank, self.topology.world.size)
        for found in self.topology.exchange(wrong):
            if found:
                return found[0]
        assert reader is not None
        self._check_fits(folder, reader.manifest)
        wanted = trained_shapes(network(self.run.model, self.run.task.lora, self.labels, ALONE))
        return reader if reader.shapes == wanted else f"the shapes of tensors in {MANIFEST} differ from the network's"

    def _check_fits(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise UserError unless the checkpoint has the same network, optimizer and tokenizer as this run."""
        saved, now = manifest["config"]["model"], to_dict(self.run)["model"]
        for name in now:
            if name not in MAY_DIFFER and saved.get(name) != now[name]:
                raise UserError(
                    f"{folder} was trained with model.{name}={saved.get(name)}, but this run has {now[name]}: a run "
                    "cannot continue with another network; set the value back, or start in another run.dir"
                )
        self._check_labels(folder, manifest.get("labels"))
        self._check_adapts(folder, manifest)
        optimizer, ours = saved_optimizer(manifest["config"]), self.run.optimizer.name.value
        if optimizer != ours:
            raise UserError(
                f"{folder} was trained with optimizer.name={optimizer!r}, this run has {ours}: another optimizer "
                f"cannot use its state; set the value back, or start in another run.dir with init_from={folder}"
            )
        if (folder / "tokenizer" / TOKENIZER).read_bytes() != self.tokenizer_files[TOKENIZER]:
            raise UserError(
                f"{folder} was trained with another tokenizer than {self.tokenizer}, so the same ids mean other "
                f"tokens: set data.tokenizer={folder / 'tokenizer'}, or start in another run.dir"
            )

    def _check_labels(self, folder: Path, saved: dict[str, Any] | None) -> None:
        """Raise UserError unless the checkpoint and the run are both language models or have the same labels."""
        now = None if self.labels is None else _labels_as_json(self.labels)
        if saved != now:
            raise UserError(
                f"{folder} is {_describe(saved)}, but this run trains {_describe(now)}: set task or task.labels back, "
                f"or start in another run.dir with init_from={folder}"
            )

    def _check_adapts(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise UserError unless the checkpoint and the run train the same weights.

        The checkpoint's run and this run must both train all weights, or the same LoRA terms on the same base."""
        then, now = lora_of(manifest), self.run.task.lora
        if then.rank == now.rank == 0:
            return
        for name, saved, given in (
            ("rank", then.rank, now.rank),
            ("targets", sorted(then.targets), sorted(now.targets)),
            ("alpha", then.alpha, now.alpha),  # with another alpha, the same A and B would give other weights
        ):
            if saved != given:
                raise UserError(
                    f"{folder} was trained with task.lora.{name}={saved}, but this run has {given}: a run cannot "
                    "continue with another network; set the value back, or start in another run.dir with "
                    f"init_from={folder}"
                )
        assert self.base is not None
        if manifest["base"]["checksum"] != self.base.checksum:
            raise UserError(
                f"{folder} adapts {manifest['base']['checkpoint']} (checksum {manifest['base']['checksum']}), but "
                f"init_from={self.run.init_from} has other weights (checksum {self.base.checksum}): set init_from "
                "back, or start in another run.dir"
            )

    def _print_changes(self, manifest: dict[str, Any]) -> None:
        """Print a table of what has changed since the checkpoint: settings, versions of libraries, text, devices and
        the number of processes. What an older checkpoint does not state counts as unchanged."""
        change_paths(manifest["config"], Run, absolute)  # older checkpoints contain the paths as the user typed them
        own = self._versions() | {"text": self.text, "device": self.device, "processes": self.topology.world.size}
        stated = {name: manifest[name] for name in ("text", "device") if name in manifest}
        stated |= manifest["versions"] | {"processes": manifest["layout"]["world size"]}
        then, now = manifest["config"] | own | stated, recorded(self.run) | own
        rows = [row for row in changes(then, now) if row[0] not in NOT_COMPARED]
        if rows:
            say("changed since the checkpoint:")
            for line in aligned([["", "then", "now"], *rows]).split("\n"):
                say(f"  {line}")

    def _versions(self) -> dict[str, str]:
        cuda = {"cuda": torch.version.cuda or "none"}
        return {"python": platform.python_version(), **{name: version(name) for name in RECORDED}, **cuda}


def _labels_as_json(labels: Labels) -> dict[str, Any]:
    return {"names": list(labels.names), "problem_type": labels.problem_type and labels.problem_type.value}


def _resumes_from(checkpoint: Path | None) -> str:
    return f"resumes from {checkpoint}" if checkpoint else "starts again from step 0"


def _describe(labels: dict[str, Any] | None) -> str:
    if labels is None:
        return "a language model"
    names = labels["names"]
    return f"a classifier of {', '.join(names[:5])}{', …' if len(names) > 5 else ''} ({labels['problem_type']})"
