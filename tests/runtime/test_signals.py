"""A share of the table that `signals.py` makes; all of it with --long."""

from __future__ import annotations

from pathlib import Path

import pytest
from signals import CELLS, end_one

SHARE = {("python", "closed terminal", "HUP"), ("python", "| tee", "INT")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all cells, which share their text and the straight runs."""
    return tmp_path_factory.mktemp("signals")


@pytest.mark.parametrize(
    ("launcher", "terminal", "name"),
    [pytest.param(*cell, marks=() if cell in SHARE else pytest.mark.long) for cell in CELLS],
)
def test_a_run_that_is_ended_is_saved_and_goes_on(folder: Path, launcher: str, terminal: str, name: str) -> None:
    cell = end_one(folder, launcher, terminal, name)
    assert cell.right, cell
