"""Drops root's privileges for tests that root runs, because root may read and write every folder."""

from __future__ import annotations

import ctypes
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VERSION = 0x20080522  # version 3 of the kernel's structures in linux/capability.h, which are two triples of integers


@contextmanager
def ordinary_rights() -> Iterator[None]:
    """A context in which this thread has no effective capabilities, so that file permissions apply to root too."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    before, none = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    none[1], none[4] = before[1], before[4]  # keeps the permitted set, from which the effective set is restored
    assert libc.capset(header, none) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


if __name__ == "__main__":  # `rights.py FILE ARGUMENT …` runs a Python file without root's privileges
    sys.argv.pop(0)
    with ordinary_rights():
        runpy.run_path(sys.argv[0], run_name="__main__")
