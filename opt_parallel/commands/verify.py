"""Compare the outputs of our model and of transformers on a Hugging Face folder.

opt-parallel verify --checkpoint DIR

With `--against`, our model reads another checkpoint, such as the checkpoint that was exported. The exit status is 0 if
the outputs agree, and 1 if they differ.

transformers cannot read a metaseq folder. Its files are compared with a list of MD5 sums, and all values are read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opt_parallel.config.options import parsed
from opt_parallel.config.paths import reach
from opt_parallel.metaseq.files import is_metaseq
from opt_parallel.runtime.errors import UserError, reporting
from opt_parallel.runtime.log import quiet_libraries, say

MOST = 20  # maximum number of findings to print


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Hugging Face or metaseq folder")
    parser.add_argument("--against", type=Path, help="…/checkpoints/step-<N>, or another Hugging Face folder")
    parser.add_argument("--md5", type=Path, help="list of MD5 sums of a metaseq checkpoint, such as Meta's")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel degree of our model")
    return parser


def main() -> int:
    arguments = parsed(parser())
    if arguments.tensor < 1:
        raise UserError(f"--tensor {arguments.tensor} must be at least 1")
    quiet_libraries()
    if (folder := reach("--checkpoint ", arguments.checkpoint)) and is_metaseq(folder):
        return verify_metaseq(arguments)
    if arguments.md5:
        raise UserError(f"--md5 {arguments.md5}: {arguments.checkpoint} is not a metaseq checkpoint: leave --md5 out")
    from opt_parallel.tools.verify import verify

    verdict = verify(arguments.checkpoint, arguments.against, arguments.tensor)
    if verdict is None:
        return 0
    for finding in verdict.findings[:MOST]:
        say(f"  {finding}")
    if len(verdict.findings) > MOST:
        say(f"  and {len(verdict.findings) - MOST} more")
    figures = ", ".join(f"{name} {difference:.1e}" for name, difference in verdict.differences.items())
    whose = "" if arguments.against is None else f" {arguments.against} in"
    say(
        f"{arguments.checkpoint}: {'agrees' if verdict.agrees else 'DISAGREES'} with{whose} transformers"
        + (f"; largest difference of outputs: {figures} (limit {verdict.limit:.1e})" if figures else "")
    )
    return 0 if verdict.agrees else 1


def verify_metaseq(arguments: argparse.Namespace) -> int:
    """Read all values of a metaseq checkpoint, and print what is odd in them."""
    from opt_parallel.tools.metaseq import odd_values

    if arguments.against is not None or arguments.tensor != 1:
        raise UserError(
            f"--checkpoint {arguments.checkpoint} is a metaseq checkpoint, which transformers cannot read: export it, "
            "and verify the export --against it"
        )
    lines = odd_values(arguments.checkpoint, arguments.md5)
    for line in lines:
        say(line)
    sums = ", and its files have their MD5 sums" if arguments.md5 else ""
    if not lines:
        say(f"{arguments.checkpoint} is complete: all values are finite and small, and copies agree{sums}")
    return 1 if lines else 0


def run() -> None:
    with reporting():
        sys.exit(main())
