"""Start a run on this host or on a cluster: `python launch/submit.py launch=slurm launch.nodes=2 model=opt-1.3b …`.

Arguments that begin with `launch` choose a file of configs/launch/ and set its keys. All other arguments are passed to
train.py. launch.dry_run=true prints the command, batch script or manifests and starts nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from opt_parallel.config.compose import one_line_errors
from opt_parallel.launching.submit import submit

if __name__ == "__main__":
    with one_line_errors():
        submit(Path(os.path.abspath(__file__)).parent.parent, sys.argv[1:])
