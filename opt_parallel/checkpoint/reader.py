"""Reads weights and the optimizer's state from a checkpoint that any number of ranks has written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from opt_parallel.checkpoint.boxes import Box, Ranges, Shared, boxes_of, shared_by, span_of
from opt_parallel.checkpoint.fragments import Fragments, kinds_in, shard_of_part
from opt_parallel.checkpoint.manifest import file_in, read_manifest
from opt_parallel.checkpoint.stored import StoredFile
from opt_parallel.parallel.shard import Shard, require_same_tensors
from opt_parallel.runtime.clock import Clock
from opt_parallel.zero import Fragment

CHUNK = 2**22  # number of elements that are read at a time if the file stores them in another order


Read = tuple[str, Shared, dict[str, Tensor]]  # a full tensor, a part of it, and the tensor of each kind that it fills


class CheckpointReader:
    """Reads slices of the weights and of the optimizer's state from a training checkpoint."""

    dtype = torch.float32

    def __init__(self, folder: Path) -> None:
        """Open the checkpoint in `folder`.

        Raises: Damaged unless the fragments contain each element of each tensor exactly once, and UserError if this
        version does not have the checkpoint's optimizer."""
        self.folder, self.manifest = folder, read_manifest(folder)
        self.fragments = Fragments(folder, self.manifest, kinds_in(folder, self.manifest))
        self.shapes = {name: tuple(saved["shape"]) for name, saved in self.manifest["tensors"].items()}
        self.files: dict[str, StoredFile] = {}  # the files that have been opened so far

    @property
    def clock(self) -> Clock:
        """The run's position when the checkpoint was saved."""
        return Clock.saved(self.manifest["clock"])

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the checkpoint contains exactly the tensors `wanted`."""
        require_same_tensors(str(self.folder), wanted, self.shapes)

    def holds(self, name: str) -> bool:
        """Whether the checkpoint contains the full tensor `name`."""
        return name in self.shapes

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The elements `shard.range` of the full tensor `name` in fp32. Raises: UserError if a file is damaged."""
        return self.read("weights", name, shard.range)

    def read_tensor(self, kind: str, name: str) -> Tensor | None:
        """A full tensor, or a moment of this tensor. The result is None if the checkpoint has no moments yet.

        Raises: UserError if a file is damaged."""
        if kind not in self.fragments.kinds:
            return None
        return self.read(kind, name, tuple(slice(0, size) for size in self.shapes[name]))

    def read(self, kind: str, name: str, ranges: Ranges) -> Tensor:
        """The elements `ranges` of a full tensor or of its moment `kind`, in fp32.

        Raises: UserError if a file is damaged."""
        box = Box(0, ranges)
        values = torch.empty(box.numel)
        self._copy([(name, [box], {kind: values})])
        return box.of(values)

    def restore(self, fragments: Iterable[Fragment]) -> None:
        """Copy the saved values into the fragments of this rank's optimizer. Raises: UserError if a file is damaged."""
        self._copy((each.name, boxes_of(each.shard, each.start, len(each.weights)), each.tensors) for each in fragments)

    def plan(self, wanted: Iterable[tuple[str, list[Box], dict[str, Tensor]]]) -> dict[str, list[Read]]:
        """The reads that fill tensors with rectangles of full tensors, by file, so that each file is opened once.

        `wanted` has the name of a full tensor, its rectangles, and the tensor of each kind that they fill."""
        reads: dict[str, list[Read]] = defaultdict(list)
        for name, boxes, tensors in wanted:
            for file, shared in self._stored(name, boxes):
                reads[file].append((name, shared, tensors))
        return reads

    def _copy(self, wanted: Iterable[tuple[str, list[Box], dict[str, Tensor]]]) -> None:
        for name, reads in self.plan(wanted).items():
            with self.file(name) as file:
                for tensor, shared, tensors in reads:
                    for kind, values in tensors.items():
                        _read(file, f"{kind}/{tensor}", shared, shared.mine.of(values)[shared.into])

    def file(self, name: str) -> StoredFile:
        """The file `name` of the checkpoint, whose header is read only once. Raises: Damaged."""
        if name not in self.files:
            self.files[name] = StoredFile(file_in(self.folder, name))
        return self.files[name]

    def _stored(self, name: str, boxes: list[Box]) -> Iterator[tuple[str, Shared]]:
        """The intersections of rectangles of a full tensor with the stored fragments, each with its file."""
        tensor = self.manifest["tensors"][name]
        size = shard_of_part(tensor, 0).local_shape[tensor["dim"]]
        for box in boxes:
            split = box.ranges[tensor["dim"]]
            for part in range(split.start // size, min(-(-split.stop // size), tensor["parts"])):
                shard = shard_of_part(tensor, part)
                for file, start, count in self.fragments.holding(name, part, *span_of(shard, box.ranges)):
                    for shared in shared_by([box], boxes_of(shard, start, count)):
                        yield file, shared


def _read(file: StoredFile, key: str, shared: Shared, into: Tensor) -> None:
    """Read the values of a rectangle into `into`, without a copy if the file stores them in the same order and dtype.

    Into bf16, the values are rounded to the nearest bf16 value."""
    box, ranges = shared.theirs, shared.out_of
    row = box.numel // box.shape[0]
    first, last = ranges[0].start, ranges[0].stop
    full_rows = all(part == slice(0, size) for part, size in zip(ranges[1:], box.shape[1:], strict=True))
    if full_rows and into.is_contiguous() and into.device.type == "cpu" and into.dtype is torch.float32:
        file.read(key, box.offset + first * row, into)
        return
    step = max(1, CHUNK // row)
    for begin in range(first, last, step):
        end = min(begin + step, last)
        rows = file.new(key, box.offset + begin * row, (end - begin, *box.shape[1:]))
        into[begin - first : end - first] = rows[(slice(None), *ranges[1:])].to(into.device)
