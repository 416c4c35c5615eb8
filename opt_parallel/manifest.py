"""What one of our checkpoints says of itself: `manifest.json`, written last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opt_parallel.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder, docs/checkpoint-format.md
KEYS = {"clock", "updates", "loss_scale", "layout", "versions", "config", "tensors", "files"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of itself.

    Raises: UserError if `folder` is no checkpoint of ours, or of another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no checkpoint: {MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not manifest.keys() >= KEYS:
        raise UserError(
            f"{folder} is no checkpoint: {MANIFEST} is not of format {FORMAT}, which this version reads; "
            "remove the file if the folder is another's"
        )
    return manifest


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """What differs between two manifests' (or nested sections') values: `section.key`, then, now."""
    then, now = _flat(before), _flat(after)
    differing = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return [[key, str(then.get(key, "—")), str(now.get(key, "—"))] for key in differing]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
