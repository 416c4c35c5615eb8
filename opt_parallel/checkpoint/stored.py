"""Reads slices of a checkpoint's safetensors file.

The file is not memory-mapped: mapped pages count as the process's memory until the file is closed, and to close it
after each tensor would mean to parse the header for each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opt_parallel.checkpoint.manifest import Damaged


class StoredFile:
    """The one-dimensional float32 tensors of a file."""

    def __init__(self, path: Path) -> None:
        """Raises: Damaged if `path` is not a safetensors file."""
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks the header
                pass
            with open(path, "rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(begin - 8))
        except (OSError, SafetensorError) as error:
            raise Damaged(path.parent, f"{path.name} cannot be read ({error})") from error
        self.offsets = {  # each tensor's first byte and end
            key: tuple(begin + offset for offset in entry["data_offsets"])
            for key, entry in header.items()
            if entry.get("dtype") == "F32"
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {key: end - begin for key, (begin, end) in self.offsets.items()}

    def read(self, key: str, first: int, into: Tensor) -> None:
        """Fill `into`, a contiguous tensor on the CPU, with the elements of `key` from index `first` on.

        Raises: Damaged if the file does not hold them."""
        start, end = self.offsets.get(key, (0, 0))
        offset, left = start + 4 * first, memoryview(into.view(-1).numpy()).cast("B")  # type: ignore[arg-type]
        try:
            if offset + len(left) > end:
                raise OSError(f"it has no {key} of that size")
            with open(self.path, "rb", buffering=0) as file:
                while left:
                    count = os.preadv(file.fileno(), [left], offset)
                    if count == 0:
                        raise OSError("it ends early")
                    offset, left = offset + count, left[count:]
        except OSError as error:
            raise Damaged(self.path.parent, f"{self.path.name} cannot be read ({error})") from error

    def new(self, key: str, first: int, shape: tuple[int, ...]) -> Tensor:
        """The elements of `key` from index `first` on as a new tensor of `shape`."""
        values = torch.empty(shape)
        self.read(key, first, values)
        return values
