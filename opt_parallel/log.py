"""Words to the user: rank 0 speaks, the others are silent; libraries speak only when something is wrong."""

from __future__ import annotations

import logging
import os
import sys
import warnings

QUIET = ("deepspeed", "DeepSpeed", "torch.distributed", "accelerate", "datasets", "filelock", "wandb", "matplotlib")
SAYS_IT_AGAIN = "huggingface_hub.utils._http"  # each retry, of what our own line says at the end


def is_main() -> bool:
    """Whether this process is rank 0, by the launcher's word: known before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print one line on rank 0."""
    if is_main():
        print(text, file=sys.stdout, flush=True)


def aligned(lines: list[list[str]]) -> str:
    """Lines of equally many cells in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def quiet_libraries() -> None:
    """Hold back the libraries' chatter below a warning; must run before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    said_by_us = ("real_accelerator.py", "loss_scaler.py")  # that there is no GPU, that gradients are not finite
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.filename not in said_by_us)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(SAYS_IT_AGAIN).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
