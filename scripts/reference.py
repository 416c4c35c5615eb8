"""Write docs/configuration.md and the text of --help from the comments in the configuration's dataclasses, and the
tables of plans in docs/planning.md."""

from __future__ import annotations

from pathlib import Path

from opt_parallel.benchmarks.plans import page as planned
from opt_parallel.config.reference import PAGES
from opt_parallel.runtime.log import say


def main() -> None:
    for name, page in PAGES.items():
        path = Path(__file__).parent.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page())
        say(f"wrote {name}")
    planning = Path(__file__).parent.parent / "docs" / "planning.md"
    planning.write_text(planned(planning.read_text()))
    say("wrote docs/planning.md")


if __name__ == "__main__":
    main()
