"""Prints, as JSON, what the default tests of this folder check of steps on fake CUDA tensors.

They run in one process, because a process keeps the fake device, and a cold start costs as much as the steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def print_results() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import test_fake_cuda
    import test_rehearsal

    from opt_parallel.rehearsal.fake_cuda import load

    load()
    print(json.dumps({"network": test_fake_cuda.results(), "step": test_rehearsal.results()}))
