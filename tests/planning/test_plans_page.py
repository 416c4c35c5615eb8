"""The table of plans in docs/planning.md."""

from __future__ import annotations

import pytest
from command import ROOT

from opt_parallel.benchmarks import plans

PAGE = ROOT / "docs" / "planning.md"


def test_a_row_of_the_table_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` writes the table again."""
    monkeypatch.setattr(plans, "DEVICES", (8,))
    assert plans.markdown(["6.7b"]).splitlines()[2] in PAGE.read_text().splitlines()


@pytest.mark.long
def test_the_table_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert plans.page(text) == text
