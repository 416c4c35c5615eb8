"""Write docs/configuration.md and the text of --help from the comments in the configuration's dataclasses."""

from __future__ import annotations

from pathlib import Path

from opt_parallel.config.reference import PAGES
from opt_parallel.runtime.log import say


def main() -> None:
    for name, page in PAGES.items():
        path = Path(__file__).parent.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page())
        say(f"wrote {name}")


if __name__ == "__main__":
    main()
