"""Compare our logits with transformers' on the same files: `python scripts/verify.py --checkpoint DIR`.

Status 0 if they agree, 1 if they do not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opt_parallel.errors import reporting
from opt_parallel.log import quiet_libraries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Hugging Face folder")
    arguments = parser.parse_args()
    quiet_libraries()
    from opt_parallel.verify import TOLERANCE, logit_differences

    differences = logit_differences(arguments.checkpoint)
    agree = max(differences.values()) <= TOLERANCE
    figures = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    print(
        f"{arguments.checkpoint}: {'agrees' if agree else 'DISAGREES'} with transformers; "
        f"largest difference of logits: {figures} (limit {TOLERANCE:.0e})"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    with reporting():
        sys.exit(main())
