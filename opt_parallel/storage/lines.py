"""A text file to which a run appends lines. No line is lost if the disk is full for a while or the file is removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from opt_parallel.runtime.log import say
from opt_parallel.storage.atomic import write_bytes


class Lines:
    """A text file opened for appending. Lines that cannot be written are kept in memory, with one warning, and written
    later. If the file is removed, it is created again with all its lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._kept = bytearray()
        self._failed = False

    def write(self, line: str) -> None:
        """Append a line. Never raises."""
        self._kept += line.encode() + b"\n"
        self.flush()

    def close(self) -> None:
        """Close the file. A warning gives the number of lines that could not be written."""
        if self._kept:
            self.flush()
        if lost := self._kept.count(b"\n"):
            say(f"warning: the last {lost} lines of {self.path} could not be written")
        if self._file is not None:
            self._file.close()

    def flush(self) -> None:
        """Write the lines that are kept in memory, and create the file if it is missing. Never raises."""
        try:
            file = self._opened()
            while self._kept:
                del self._kept[: file.write(self._kept)]
        except OSError as error:
            if not self._failed:
                say(f"warning: {self.path} cannot be written ({error.strerror}): the run keeps the lines in memory")
            self._failed = True
            return
        if self._failed:
            say(f"{self.path} is written again, and no line is lost")
        self._failed = False

    def _opened(self) -> BinaryIO:
        """The open file at `path`, created again if it was removed. Raises: OSError."""
        if self._file is not None and self._is_there(self._file):
            return self._file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._file is not None:
            self._file.seek(0)
            write_bytes(self.path, self._file.read())
            say(f"warning: {self.path} was removed or moved: it is created again with all its lines")
            self._file.close()
            self._file = None
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        return self._file

    def _is_there(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False
