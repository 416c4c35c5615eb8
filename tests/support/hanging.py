"""A rank whose main thread hangs, as in a call to a device that never returns.

The first two arguments are the beat and the patience of the ring in seconds. Each further argument is the time in
seconds that the main thread hangs in a topology, which is opened anew for each of these arguments."""

from __future__ import annotations

import sys
import time

from opt_parallel.parallel import liveness
from opt_parallel.parallel.topology import Topology
from opt_parallel.runtime.errors import reporting

if __name__ == "__main__":
    liveness.BEAT, liveness.PATIENCE = map(float, sys.argv[1:3])
    with reporting():
        for seconds in sys.argv[3:]:
            with Topology.open(1) as topology:
                topology.exchange(None)
                print("hangs", flush=True)
                time.sleep(float(seconds))
    print("ended", flush=True)
