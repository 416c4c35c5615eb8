"""Changes checkpoints, as a user or a damaged disk would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from safetensors.numpy import load_file, save

from opt_parallel.checkpoint.fragments import TABLES
from opt_parallel.storage.checked import CHECKSUM, dump_checked


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], checksum: bool = True) -> None:
    """Change a checkpoint's manifest. Correct its checksum, or remove the checksum as in earlier versions."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop(CHECKSUM, None)
    change(manifest)
    path.write_text(dump_checked(manifest) if checksum else json.dumps(manifest))


def edit_tables(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change the tables of a checkpoint's fragments, and correct their entry in the manifest."""
    tables = load_file(folder / TABLES)
    change(tables)
    forge(folder, TABLES, save(tables))


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and correct its entry in the manifest."""
    (folder / name).write_bytes(content)
    told = {"bytes": len(content), "crc32": f"{crc32(content):08x}"}
    edit(folder, lambda manifest: manifest["files"][name].update(told))


def to_format_1(folder: Path) -> None:
    """Turn a checkpoint with moments into one of format 1, which listed the fragments in the manifest."""
    tables = load_file(folder / TABLES)
    (folder / TABLES).unlink()

    def change(manifest: dict[str, Any]) -> None:
        manifest["format"] = 1
        del manifest["files"][TABLES]
        names = sorted(manifest["tensors"])
        for file, written in manifest["files"].items():
            written["fragments"] = [
                {
                    "name": names[tensor], "part": part, "parts": manifest["tensors"][names[tensor]]["parts"],
                    "start": start, "count": count, "kinds": ["weights", "exp_avg", "exp_avg_sq"],
                }
                for tensor, part, start, count in tables.get(file, np.empty((0, 4))).tolist()
            ]  # fmt: skip

    edit(folder, change)
