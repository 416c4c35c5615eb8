"""Reads slices of the full tensors of a metaseq checkpoint: the bytes that a rank needs, and no whole file."""

from __future__ import annotations

import math
import os
from collections import OrderedDict, deque
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from opt_parallel.huggingface.names import compare_values
from opt_parallel.metaseq.archive import HEADER, start_of
from opt_parallel.metaseq.files import EMBEDDING
from opt_parallel.metaseq.findings import Findings
from opt_parallel.metaseq.folder import TIED, Description
from opt_parallel.metaseq.stored import Flat, Full, Piece, Stored
from opt_parallel.parallel.shard import Shard, overlap, require_same_tensors
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import UserError, one_line

MOST_OPEN = 16  # Number of files that are open at a time; one tensor of OPT-175B is in a few hundred files.
CHUNK = 1 << 22  # Number of bytes that are read at a time if the file stores the elements in another order.
PAGE = 1 << 12  # Shorter runs are read together with the bytes between them, which the disk reads anyway.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Memory(Protocol):
    """Returns an uninitialised tensor."""

    def __call__(self, shape: list[int], /, *, dtype: torch.dtype) -> Tensor: ...


class Turns:
    """Memory for tensors that are used one after the other. After `count` more tensors, a tensor is overwritten.

    Reading into the same memory takes a sixth of the time of reading into new memory, which the kernel clears first."""

    def __init__(self, count: int) -> None:
        self._memory = deque(torch.empty(0, dtype=torch.uint8) for _ in range(count))

    def __call__(self, shape: list[int], /, *, dtype: torch.dtype) -> Tensor:
        self._memory.rotate()
        size = math.prod(shape) * dtype.itemsize
        if self._memory[0].numel() < size:
            self._memory[0] = torch.empty(size, dtype=torch.uint8)
        return self._memory[0][:size].view(dtype).view(shape)


class MetaseqWeights:
    """Reads the weights of a metaseq checkpoint.

    `bytes_read` counts the bytes of all reads. Of a tensor that each model part holds whole, the copy of part 0 is
    used, and each rank compares its share of the other copies with it."""

    def __init__(self, description: Description) -> None:
        """Open the described checkpoint. Raises: UserError if its weights are not floating-point numbers."""
        self.described, self.folder = description, description.folder
        if wrong := sorted(description.dtypes - DTYPES.keys()):
            raise UserError(f"{self.folder} has weights in {wrong[0]}, not one of {', '.join(DTYPES)}")
        kinds = [DTYPES[name] for name in sorted(description.dtypes)]
        self.dtype = kinds[0]
        for kind in kinds:
            self.dtype = torch.promote_types(self.dtype, kind)
        self.bytes_read, self.findings = 0, Findings()
        self.memory: Memory = torch.empty

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the files contain exactly the full tensors `wanted`."""
        held = {name: full.shape for name, full in self.described.tensors.items()}
        require_same_tensors(str(self.folder), wanted, held)

    def holds(self, name: str) -> bool:
        """Whether the files contain the full tensor `name`."""
        return name in self.described.tensors

    def __call__(self, name: str, shard: Shard) -> Tensor:
        """The elements `shard.range` of the full tensor `name`.

        Raises: UserError if a file is damaged, or if the output projection is not tied to the embedding."""
        full = self.described.tensors[name]
        values = self._read(full, shard.range)
        self.findings.look_at(name, shard.index, values)
        rank, ranks = process.rank(), process.world_size()
        for number, copy in enumerate(full.copies, start=1):
            if number % ranks == rank:
                self._compare(name, values, self._copy(copy, shard.range))
        if name == EMBEDDING and self.described.tied:
            self._require_tied(values, self._read(self.described.tied, shard.range))
        return values

    def _compare(self, name: str, values: Tensor, other: Tensor) -> None:
        count, largest = compare_values(values.float(), other.float())
        if count:
            self.findings.differs(name, largest)

    def _require_tied(self, embedding: Tensor, other: Tensor) -> None:
        if compare_values(embedding, other)[0]:
            raise UserError(
                f"{self.folder}: {TIED[0]} differs from {EMBEDDING}, but OPT uses the same weights for both: a "
                "separate output projection is not supported"
            )

    def _read(self, full: Full, ranges: tuple[slice, ...]) -> Tensor:
        """The elements `ranges` of a full tensor."""
        kinds = {DTYPES[block.stored.flat.dtype] for block in full.blocks}
        dtype = kinds.pop() if len(kinds) == 1 else self.dtype
        values = self.memory([part.stop - part.start for part in ranges], dtype=dtype)
        with _Files(self.folder) as files:
            for block in full.blocks:
                common = overlap(ranges, block.ranges)
                if common is not None:
                    into, out_of = common
                    _copy_rows(files, block.stored, block.first, out_of, values[into])
            self.bytes_read += files.bytes_read
        return values

    def _copy(self, stored: Stored, ranges: tuple[slice, ...]) -> Tensor:
        """The elements `ranges` of a part's copy of a tensor."""
        values = torch.empty([part.stop - part.start for part in ranges], dtype=DTYPES[stored.flat.dtype])
        with _Files(self.folder) as files:
            _copy_rows(files, stored, 0, ranges, values)
            self.bytes_read += files.bytes_read
        return values


def _copy_rows(files: _Files, stored: Stored, first: int, ranges: tuple[slice, ...], into: Tensor) -> None:
    """Copy the elements `ranges` of a block, whose rows start at row `first` of a stored tensor, into a view."""
    if len(ranges) > len(stored.shape):  # the block is a query, key or value of the stacked parameter
        ranges, into = ranges[1:], into[0]
    rows = slice(ranges[0].start + first, ranges[0].stop + first)
    columns = ranges[1] if len(ranges) > 1 else slice(0, 1)
    into = into.unsqueeze(1) if into.dim() == 1 else into
    width = columns.stop - columns.start
    if width == 0 or rows.stop == rows.start:
        return
    contiguous = stored.step == stored.columns == width
    if contiguous and into.is_contiguous() and into.dtype is DTYPES[stored.flat.dtype]:
        files.read(stored.flat, stored.start + rows.start * stored.step, into.view(-1))
        return
    apart = not contiguous and width * stored.flat.item >= PAGE
    span = stored.step if not apart else width
    count = max(1, CHUNK // (span * stored.flat.item))
    for begin in range(rows.start, rows.stop, count):
        end = min(begin + count, rows.stop)
        read = _apart if apart else _together
        into[begin - rows.start : end - rows.start] = read(files, stored, slice(begin, end), columns)


def _together(files: _Files, stored: Stored, rows: slice, columns: slice) -> Tensor:
    """The columns of some rows. The bytes between the rows are read too."""
    height = rows.stop - rows.start
    length = (height - 1) * stored.step + columns.stop - columns.start
    values = torch.empty(height * stored.step, dtype=DTYPES[stored.flat.dtype])
    files.read(stored.flat, stored.start + rows.start * stored.step + columns.start, values[:length])
    return values.view(height, stored.step)[:, : columns.stop - columns.start]


def _apart(files: _Files, stored: Stored, rows: slice, columns: slice) -> Tensor:
    """The columns of some rows. Only their bytes are read."""
    values = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=DTYPES[stored.flat.dtype])
    for row in range(rows.start, rows.stop):
        files.read(stored.flat, stored.start + row * stored.step + columns.start, values[row - rows.start])
    return values


class _Files:
    """The open files of one read. At most MOST_OPEN files are open at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read = folder, 0
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._starts: dict[Piece, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, flat: Flat, start: int, into: Tensor) -> None:
        """Read the elements of a flat tensor from element `start` on into a contiguous tensor.

        Raises: UserError if a file cannot be read or ends early."""
        target = memoryview(into.view(torch.uint8).numpy())  # type: ignore[arg-type]
        item, done = flat.item, 0
        while done < len(target):
            number, element = divmod(start + done // item, flat.length)
            length = min((flat.length - element) * item, len(target) - done)
            self._read(flat.pieces[number], element * item, target[done : done + length])
            done += length

    def _read(self, piece: Piece, offset: int, into: memoryview) -> None:
        try:
            descriptor = self._descriptor(piece.path)
            if piece not in self._starts:
                self._starts[piece] = piece.skip
                if piece.header is not None:
                    self._starts[piece] += piece.header + start_of(os.pread(descriptor, HEADER, piece.header))
            at, done = self._starts[piece] + offset, 0
            while done < len(into):
                count = os.preadv(descriptor, [into[done:]], at + done)
                if count == 0:
                    raise ValueError("it ends early")
                done += count
        except (OSError, ValueError) as error:
            raise UserError(f"{piece.path} cannot be read ({one_line(error):.200}): use a complete copy") from error
        self.bytes_read += done

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) == MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]
