"""Reads slices of the tensors in a checkpoint's safetensors file.

The file is not memory-mapped, because mapped pages count as the process's memory until the file is closed. The header
is parsed once. The file is open only while tensors are read, because NFS cannot delete the folder of an open file.
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
    """A safetensors file of a checkpoint, which contains one-dimensional float32 tensors.

    `read` and `new` need the file to be open, in a `with` block."""

    def __init__(self, path: Path) -> None:
        """Raises: Damaged if `path` is not a safetensors file."""
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # raises an error if the header is damaged
                pass
            with open(path, "rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(begin - 8))
        except (OSError, SafetensorError) as error:
            raise Damaged(path.parent, f"{path.name} cannot be read ({error})") from error
        self.offsets = {  # the first byte of each tensor, and the byte after its end
            key: tuple(begin + offset for offset in entry["data_offsets"])
            for key, entry in header.items()
            if entry.get("dtype") == "F32"
        }

    def __enter__(self) -> StoredFile:
        try:
            self.file = open(self.path, "rb", buffering=0)
        except OSError as error:
            raise Damaged(self.path.parent, f"{self.path.name} cannot be read ({error})") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def sizes(self) -> dict[str, int]:
        """The number of bytes of each tensor."""
        return {key: end - begin for key, (begin, end) in self.offsets.items()}

    def read(self, key: str, first: int, into: Tensor) -> None:
        """Read the elements of the tensor `key` from index `first` on into `into`, a contiguous tensor on the CPU.

        Raises: Damaged if the file cannot be read, has no tensor `key`, or if the tensor has fewer elements."""
        start, end = self.offsets.get(key, (0, 0))
        offset, left = start + 4 * first, memoryview(into.view(-1).numpy()).cast("B")  # type: ignore[arg-type]
        try:
            if offset + len(left) > end:
                raise OSError(f"the file has no tensor {key} of this size")
            while left:
                count = os.preadv(self.file.fileno(), [left], offset)
                if count == 0:
                    raise OSError("the file ends early")
                offset, left = offset + count, left[count:]
        except OSError as error:
            raise Damaged(self.path.parent, f"{self.path.name} cannot be read ({error})") from error

    def new(self, key: str, first: int, shape: tuple[int, ...]) -> Tensor:
        """The elements of the tensor `key` from index `first` on, as a new tensor of `shape`."""
        values = torch.empty(shape)
        self.read(key, first, values)
        return values
