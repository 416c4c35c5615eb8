"""Writes a rank's file of a checkpoint in a thread, while training continues.

`Saver.start` copies the values that the rank saves into a buffer in host memory, and returns. A thread writes the
buffer to the file, calls fsync, and waits for the threads of the other ranks. Then rank 0 completes the checkpoint. The
threads communicate in their own process group. The buffer is reused for each checkpoint, and is pinned if there is a
GPU. For each element that the rank saves, it has 4 bytes for the fp32 weight and 4 for each moment, so 12 with AdamW.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from opt_parallel.checkpoint.fragments import Row
from opt_parallel.huggingface.folder import safetensors_header
from opt_parallel.parallel.topology import FIXED_TIMEOUT, Topology
from opt_parallel.storage.atomic import confirm, remove
from opt_parallel.zero import Fragment

CHUNK = 2**20  # bytes that are written at a time; a chunk fits the CPU's cache, from which its checksum is computed


def rank_file(rank: int) -> str:
    """The name of the file that rank number `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


class Saver:
    """Writes checkpoints in a thread, at most one checkpoint at a time."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        several = topology.world.size > 1
        # The threads need their own process group, because their collectives run at the same time as those of
        # training, and because writing may take longer than the timeout of a training step.
        self.group = dist.new_group(backend="gloo", group_desc=FIXED_TIMEOUT) if several else None
        self.buffer = torch.empty(0)
        self.thread: threading.Thread | None = None
        self.failure: str | None = None
        self.lost: Exception | None = None
        self._failed(None)  # connects the ranks, because the launcher's store may have ended before the first save

    def start(
        self,
        fragments: Iterable[Fragment],
        names: list[str],
        folder: Path,
        complete: Callable[[], None],
        tidy_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the `fragments` that this rank saves, and start the thread that writes them to `folder`.

        `names` are the sorted names of all tensors, by whose position the table of this rank's fragments names them.
        Rank 0 calls `complete` when all ranks have written their files, and calls `tidy_up` if `complete` succeeds."""
        assert self.thread is None
        saved = list(fragments)
        shapes = self._copy(saved)
        numbers = {name: number for number, name in enumerate(names)}
        rows: list[Row] = [(numbers[each.name], each.shard.index, each.start, len(each.weights)) for each in saved]
        self.failure = None
        write = partial(self._write_together, folder, shapes, rows, complete, tidy_up)
        self.thread = threading.Thread(target=self._in_thread, args=(write,))
        self.thread.start()

    def join(self) -> None:
        """Wait until the thread of the last save has ended."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> str | None:
        """Wait until the last save has ended, and return a message if the save failed on any rank, or None.

        Raises: torch's RuntimeError, if another rank has ended. The next start deletes the unfinished checkpoint."""
        self.join()
        if self.lost is not None:
            raise self.lost
        failure, self.failure = self.failure, None
        return failure

    def close(self) -> None:
        """Destroy the process group of the threads."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def _copy(self, fragments: list[Fragment]) -> dict[str, tuple[int, ...]]:
        """Copy the fragments to the buffer. Return the shapes of the file's tensors."""
        total = sum(len(values) for fragment in fragments for values in fragment.tensors.values())
        on_gpu = self.topology.device.type == "cuda"
        if len(self.buffer) != total:
            self.buffer = torch.empty(total, pin_memory=on_gpu)
        shapes: dict[str, tuple[int, ...]] = {}
        end = 0
        for fragment in fragments:
            for kind, values in fragment.tensors.items():
                shapes[f"{kind}/{fragment.name}"] = tuple(values.shape)
                self.buffer[end : end + len(values)].copy_(values, non_blocking=True)
                end += len(values)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return shapes

    def _in_thread(self, write: Callable[[], str | None]) -> None:
        try:
            self.failure = write()
        except Exception as error:  # the collectives of the group fail if a rank has ended
            self.lost = error

    def _write_together(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        rows: list[Row],
        complete: Callable[[], None],
        tidy_up: Callable[[], None],
    ) -> str | None:
        """Write the checkpoint together with the other ranks. Return an error message, or None after a success."""
        failure: str | None = None
        try:
            self._write_file(folder, shapes, rows)
        except Exception as error:  # any error, because this thread has no caller, and other ranks wait for its result
            failure = _why(error)
        failed = self._failed(failure)
        if failed is None and self.topology.is_main:
            try:
                complete()
            except Exception as error:
                failure = _why(error)
        failed = failed or self._failed(failure)
        if self.topology.is_main:
            if failed:
                remove(folder)  # at this point, all ranks have closed their files
            else:
                tidy_up()
        return failed

    def _write_file(self, folder: Path, shapes: dict[str, tuple[int, ...]], rows: list[Row]) -> None:
        """Write this rank's file, and a second file with its entry for the manifest and its table."""
        path = folder / rank_file(self.topology.world.rank)
        header = safetensors_header(shapes, torch.float32)
        data = memoryview(self.buffer.numpy()).cast("B")  # type: ignore[arg-type]
        with open(path, "wb") as file:
            file.write(header)
            checksum = zlib.crc32(header)
            for begin in range(0, len(data), CHUNK):
                file.write(data[begin : begin + CHUNK])
                checksum = zlib.crc32(data[begin : begin + CHUNK], checksum)
            file.flush()
            confirm(file.fileno(), path)
        note = {"bytes": len(header) + len(data), "crc32": f"{checksum:08x}", "table": rows}
        path.with_suffix(".json").write_text(json.dumps(note))

    def _failed(self, failure: str | None) -> str | None:
        """The `failure` of the lowest rank whose save failed, or None if no save failed.

        The message starts with the name of the rank, unless it is rank 0."""
        failures: list[str | None] = [failure]
        if self.group is not None:
            failures *= self.topology.world.size
            dist.all_gather_object(failures, failure, group=self.group)
        for rank, why in enumerate(failures):
            if why is not None:
                return f"{why} on {self.topology.where(rank)}" if rank else why
        return None


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or repr(error)
