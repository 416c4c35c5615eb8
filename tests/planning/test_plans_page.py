"""The table of plans in docs/planning.md."""

from __future__ import annotations

import pytest
from command import ROOT

from opt_parallel.benchmarks.plans import markdown, page

PAGE = ROOT / "docs" / "planning.md"


def test_a_size_in_the_table_is_up_to_date() -> None:
    """`make docs` writes the table again."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| 6.7b ")]
    assert rows == markdown(["6.7b"]).splitlines()[2:]


@pytest.mark.long
def test_the_table_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert page(text) == text
