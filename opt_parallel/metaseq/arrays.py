"""Reads the headers of a folder with one NumPy file for each tensor, which Alpa and FlexGen write."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from opt_parallel.metaseq.stored import Flat, Piece, Stored
from opt_parallel.runtime.errors import UserError, one_line

READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
DTYPES = ("float16", "float32", "float64")


def array_in(path: Path) -> Stored | None:
    """The array in a file, or None for a single number. Raises: UserError if the file is no array of numbers in the
    order of C, or if it ends early."""
    try:
        with open(path, "rb") as file:
            shape, columns_first, dtype = READERS[np.lib.format.read_magic(file)](file)
            start = file.tell()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a NumPy file ({one_line(error):.200}): use a complete copy") from error
    name = dtype.newbyteorder("=").name
    if name not in DTYPES or not dtype.isnative or (columns_first and len(shape) > 1):
        order = ", in Fortran's order" if columns_first else ""
        raise UserError(f"{path} has values of {dtype.str}{order}: convert it to float16 or float32 in C's order")
    if path.stat().st_size < start + math.prod(shape) * dtype.itemsize:
        raise UserError(f"{path} ends early: use a complete copy")
    if not shape:
        return None
    return Stored(Flat((Piece(path, None, start),), math.prod(shape), name), 0, shape, math.prod(shape[1:]))
