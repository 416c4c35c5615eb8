"""A safetensors file of a checkpoint, read in slices.

Not mapped into memory: what is mapped counts as the process's own until the file is closed, and closing it after each
tensor would mean to parse the header as often.
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
        """Raises: Damaged if it is not a safetensors file."""
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # which checks the header
                pass
            with open(path, "rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(begin - 8))
        except (OSError, SafetensorError) as error:
            raise Damaged(path.parent, f"{path.name} cannot be read ({error})") from error
        self.places = {  # in bytes: where each begins and ends
            key: tuple(begin + offset for offset in entry["data_offsets"])
            for key, entry in header.items()
            if entry.get("dtype") == "F32"
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {key: end - begin for key, (begin, end) in self.places.items()}

    def read(self, key: str, first: int, into: Tensor) -> None:
        """Elements of `key` from number `first` on, as many as `into` has: a contiguous tensor, on the CPU.

        Raises: Damaged if they are not there."""
        start, end = self.places.get(key, (0, 0))
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
        """The same as a new tensor of `shape`."""
        values = torch.empty(shape)
        self.read(key, first, values)
        return values
