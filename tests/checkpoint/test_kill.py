"""A run that is killed while it saves loses nothing that was whole; `kill_saves.py` does it more often."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_saves import kill_saves


@pytest.mark.long
def test_killed(tmp_path: Path) -> None:
    tally = kill_saves(tmp_path, kills=1, seed=5)
    assert len(tally.resumed_at) == 2
    assert tally.resumed_at[-1] > 0
