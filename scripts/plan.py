"""`opt-parallel plan`, for a checkout of the repository."""

from __future__ import annotations

from opt_parallel.commands.plan import run

if __name__ == "__main__":
    run()
