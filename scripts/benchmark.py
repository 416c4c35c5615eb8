"""`opt-parallel benchmark`, for a checkout of the repository."""

from __future__ import annotations

from opt_parallel.commands.benchmark import run

if __name__ == "__main__":
    run()
