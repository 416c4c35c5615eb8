"""Start a run on this host or on a cluster: `opt-parallel submit launch=slurm launch.nodes=2 model=opt-1.3b …`.

Arguments that begin with `launch` choose a launch system and set its keys. All other arguments are keys of `train`.
launch.dry_run=true prints the command, batch script or manifests and starts nothing.
"""

from __future__ import annotations

import sys

from opt_parallel.config.compose import CONFIGS, one_line_errors
from opt_parallel.launching.submit import submit


def run() -> None:
    with one_line_errors():
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(page())
        else:
            submit(sys.argv[1:])


def page() -> str:
    """The help page: the documentation of this module and the files of all launch systems, which explain their keys."""
    assert __doc__ is not None
    files = sorted((CONFIGS / "launch").glob("*.yaml"))
    return "\n".join([__doc__, *(f"launch={file.stem}\n{_keys_in(file.read_text())}" for file in files)])


def _keys_in(text: str) -> str:
    return "".join(f"  launch.{line}\n" for line in text.splitlines() if not line.startswith("system:"))
