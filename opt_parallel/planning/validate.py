"""Predictions beside published measurements."""

from __future__ import annotations

from pathlib import Path


def report(path: Path, json_out: Path | None) -> str:
    """The text of `plan.py validate`: predicted beside measured for the rows of a file, and errors by source.

    `json_out` gets a list of {id, quantity, predicted, measured}. Raises: UserError if the file has no such rows."""
    raise NotImplementedError
