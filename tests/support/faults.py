"""Simulates file system errors with a small LD_PRELOAD library.

    python("train.py", …, **faults("write ENOSPC */metrics.jsonl", "fsync EINVAL */", when=folder / "now"))

Each rule consists of a system call, an error, and a pattern (fnmatch) of absolute paths. The pattern of a folder ends
with a slash. With HANG in place of an error, the call waits until the file `until` exists. The rules apply only while
the file `when` exists. The calls are open (to write), write, truncate, fsync, rename, link, mkdir, remove (of files and
folders) and flock. The library needs gcc and Linux, and `why_not` names a missing requirement.
"""

from __future__ import annotations

import errno
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def why_not() -> str | None:
    """The reason why file system errors cannot be simulated on this host, or None."""
    return None if sys.platform == "linux" and shutil.which("gcc") else "a simulated file system needs Linux and gcc"


def faults(*rules: str, when: Path | None = None, until: Path | None = None) -> dict[str, str]:
    """The environment variables of a process to which the rules apply."""
    numbered = []
    for rule in rules:
        call, name, pattern = rule.split(" ", 2)
        numbered.append(f"{call} {0 if name == 'HANG' else getattr(errno, name)} {pattern}")
    found = {"LD_PRELOAD": str(_library()), "FAULTS": "\n".join(numbered)}
    files = {"FAULTS_WHEN": when, "FAULTS_UNTIL": until}
    return found | {name: str(path) for name, path in files.items() if path is not None}


@functools.cache
def _library() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    source = Path(__file__).with_suffix(".c")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", folder / "faults.so", source, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "faults.so"
