"""Losses of opt-tiny that may only change on purpose: then rewrite golden.json and say why in the commit.

`PYTHONPATH=.:tests/support python tests/test_golden.py` rewrites it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import Layout, run_for, train, train_plainly

GOLDEN = Path(__file__).parent / "golden.json"
RUN = run_for(Layout(1, 1, 1, 2), {"attention_dropout": 0.0}, steps=10)


def test_losses_have_not_changed(crew: Any) -> None:
    losses, norms, _ = crew(1)(train, RUN)[0]
    golden = json.loads(GOLDEN.read_text())
    assert losses == pytest.approx(golden["losses"], rel=1e-4)  # other machines sum in another order
    assert norms == pytest.approx(golden["norms"], rel=1e-3)


def test_the_same_run_twice_is_identical(crew: Any) -> None:
    run = run_for(Layout(2, 1, 1, 4), {"attention_dropout": 0.1}, steps=2)
    first, second = crew(2)(train, run), crew(2)(train, run)
    assert first[0][:2] == second[0][:2]
    assert all((first[rank][2][name][2] == second[rank][2][name][2]).all() for rank in (0, 1) for name in first[0][2])


if __name__ == "__main__":
    found, norms_found, _ = train_plainly(RUN)
    GOLDEN.write_text(json.dumps({"losses": found, "norms": norms_found}, indent=1) + "\n")
