"""Changes checkpoints, as a user or a damaged disk would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opt_parallel.storage.checked import CHECKSUM, dump_checked


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], checksum: bool = True) -> None:
    """Change a checkpoint's manifest. Correct its checksum, or remove the checksum as in earlier versions."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop(CHECKSUM, None)
    change(manifest)
    path.write_text(dump_checked(manifest) if checksum else json.dumps(manifest))
