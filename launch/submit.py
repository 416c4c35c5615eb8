"""Start a run on a machine or a cluster: `python launch/submit.py launch=slurm launch.nodes=2 model=opt-1.3b …`.

What begins with `launch` chooses among configs/launch/ and sets its keys; all else is train.py's. launch.dry_run=true
prints what would be started.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from opt_parallel.compose import explain
from opt_parallel.errors import reporting
from opt_parallel.launching.submit import submit

said_in_one_line = partial(reporting, (HydraException, OmegaConfBaseException), explain)

if __name__ == "__main__":
    with said_in_one_line():
        submit(Path(os.path.abspath(__file__)).parent.parent, sys.argv[1:])
