"""The tables of plans in docs/planning.md."""

from __future__ import annotations

import pytest
from command import ROOT

from opt_parallel.benchmarks import plans

PAGE = ROOT / "docs" / "planning.md"


def test_rows_of_the_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` writes the tables again."""
    monkeypatch.setattr(plans, "DEVICES", (8,))
    lines = PAGE.read_text().splitlines()
    sizes, chosen = plans.rows(["6.7b"]), plans.choices(1)
    for table in (plans.markdown(plans.HEAD, sizes), plans.markdown(plans.CHOICES_HEAD, chosen)):
        assert table.splitlines()[2] in lines


@pytest.mark.long
def test_the_tables_are_up_to_date() -> None:
    text = PAGE.read_text()
    assert plans.page(text) == text
