"""Write what is generated from the configuration's comments: docs/configuration.md and the text of --help."""

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
