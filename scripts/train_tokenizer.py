"""`opt-parallel tokenizer`, for a checkout of the repository."""

from __future__ import annotations

from opt_parallel.commands.tokenizer import run

if __name__ == "__main__":
    run()
