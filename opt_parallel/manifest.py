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
    assert isinstance(manifest, dict)
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
