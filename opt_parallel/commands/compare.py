"""Compare runs by a plot of their losses and a table of their losses and differing settings.

opt-parallel compare runs/a runs/b                    # two runs
opt-parallel compare runs/opt-tiny                    # all runs in and below a folder, such as a sweep's
opt-parallel compare runs/a runs/b --over tokens --output a-and-b.pdf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opt_parallel.config.options import parsed
from opt_parallel.runtime.errors import reporting
from opt_parallel.runtime.log import quiet_libraries
from opt_parallel.tools.compare import AXES, diverged, draw, read_runs, table


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", type=Path, help="a run's folder, or a folder that contains runs"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("compare.png"), help="the plot's file (default compare.png)"
    )
    parser.add_argument("--over", choices=AXES, default="step", help="horizontal axis (default step)")
    return parser


def main() -> int:
    arguments = parsed(parser())
    quiet_libraries()
    records, empty = read_runs(arguments.runs)
    draw(arguments.output, records, arguments.over)
    print(table(records))
    for folder in empty:
        print(f"left out: {folder} {'diverged in its first step' if diverged(folder) else 'has no rows yet'}")
    print(f"\n{arguments.output}")
    return 0


def run() -> None:
    with reporting():
        sys.exit(main())
