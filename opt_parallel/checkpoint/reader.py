"""Reads weights and the optimizer's state from a checkpoint that any number of ranks has written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opt_parallel.checkpoint.boxes import Box, Ranges, Shared, boxes_of, shared_by
from opt_parallel.checkpoint.coverage import fault_of, kinds_in, shard_of_part
from opt_parallel.checkpoint.manifest import MANIFEST, Damaged, file_in, read_manifest
from opt_parallel.checkpoint.stored import StoredFile
from opt_parallel.parallel.shard import Shard, require_same_tensors
from opt_parallel.runtime.clock import Clock
from opt_parallel.zero import Fragment

CHUNK = 2**22  # number of elements that are read at a time if their order changes


@dataclass(frozen=True)
class Piece:
    """A stored fragment of a full tensor, and the rectangles (`boxes`) of the tensor that the fragment covers."""

    file: str
    kinds: list[str]  # "weight", and the names of the optimizer's moments if there are any
    boxes: list[Box]


class CheckpointReader:
    """Reads slices of the weights and of the optimizer's state from a training checkpoint."""

    dtype = torch.float32

    def __init__(self, folder: Path) -> None:
        """Open the checkpoint in `folder`.

        Raises: Damaged unless the fragments contain each element of each tensor exactly once, and UserError if this
        version does not have the checkpoint's optimizer."""
        self.folder, self.manifest = folder, read_manifest(folder)
        fault = fault_of(self.manifest, kinds_in(folder, self.manifest))
        if fault is not None:
            raise Damaged(folder, f"{MANIFEST} was changed after it was written ({fault})")
        self.files: dict[str, StoredFile] = {}  # the files that have been opened so far
        self.shapes = {name: tuple(saved["shape"]) for name, saved in self.manifest["tensors"].items()}
        self.pieces: dict[str, list[Piece]] = {name: [] for name in self.shapes}
        for file, content in self.manifest["files"].items():
            for fragment in content["fragments"]:
                name = fragment["name"]
                shard = shard_of_part(self.manifest["tensors"][name], fragment["part"])
                boxes = boxes_of(shard, fragment["start"], fragment["count"])
                self.pieces[name].append(Piece(file, fragment["kinds"], boxes))

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
        if not any(kind in piece.kinds for piece in self.pieces[name]):
            return None
        return self.read(kind, name, tuple(slice(0, size) for size in self.shapes[name]))

    def read(self, kind: str, name: str, ranges: Ranges) -> Tensor:
        """The elements `ranges` of a full tensor or of its moment `kind`, in fp32.

        Raises: UserError if a file is damaged."""
        box = Box(0, ranges)
        values = torch.empty(box.numel)
        self._copy(kind, name, values, [box])
        return box.of(values)

    def restore(self, fragment: Fragment) -> None:
        """Copy the saved values into a fragment of this rank's optimizer. Raises: UserError if a file is damaged."""
        boxes = boxes_of(fragment.shard, fragment.start, len(fragment.weights))
        for kind, values in fragment.tensors.items():
            self._copy(kind, fragment.name, values, boxes)

    def _copy(self, kind: str, name: str, values: Tensor, boxes: list[Box]) -> None:
        for piece in self.pieces[name]:
            shared = list(shared_by(boxes, piece.boxes))
            if not shared or kind not in piece.kinds:
                continue
            if piece.file not in self.files:
                self.files[piece.file] = StoredFile(file_in(self.folder, piece.file))
            for each in shared:
                _read(self.files[piece.file], f"{kind}/{name}", each, each.mine.of(values)[each.into])


def _read(file: StoredFile, key: str, shared: Shared, into: Tensor) -> None:
    """Read the values of a rectangle into `into`, without a copy if the file stores them in the same order."""
    box, ranges = shared.theirs, shared.out_of
    row = box.numel // box.shape[0]
    first, last = ranges[0].start, ranges[0].stop
    full_rows = all(part == slice(0, size) for part, size in zip(ranges[1:], box.shape[1:], strict=True))
    if full_rows and into.is_contiguous() and into.device.type == "cpu":
        file.read(key, box.offset + first * row, into)
        return
    step = max(1, CHUNK // row)
    for begin in range(first, last, step):
        end = min(begin + step, last)
        rows = file.new(key, box.offset + begin * row, (end - begin, *box.shape[1:]))
        into[begin - first : end - first] = rows[(slice(None), *ranges[1:])].to(into.device)
