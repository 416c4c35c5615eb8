"""What one of our checkpoints says of itself: `manifest.json`, written last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opt_parallel.errors import UserError

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of itself.

    Raises: UserError if `folder` is no checkpoint of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint: {MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or not {"config", "clock", "tensors"} <= manifest.keys():
        raise UserError(f"{folder} is no checkpoint: its {MANIFEST} is not one that training writes; remove the file")
    return manifest
