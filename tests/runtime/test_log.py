"""What the terminal shows and what the ranks' files hold, on the crew: real descriptors, real libraries' warnings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, python

from opt_parallel.runtime.log import bytes_in_words


def speak(folder: Path, failure: str | None) -> tuple[str, str]:
    """On the crew: everything that may be printed, to where a terminal would be; what came there."""
    import logging
    import warnings

    from opt_parallel.runtime import errors, log

    log.quiet_libraries()
    terminal = folder / f"terminal-{os.environ['RANK']}"
    with terminal.open("w+") as file:
        before = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with log.log_to_file(folder):
                log.say("a line of ours")
                for _ in range(3):
                    logging.getLogger("deepspeed").warning("a library is worried")
                    logging.getLogger("deepspeed").info("a library chats")
                    warnings.warn("a way of Python's", stacklevel=1)
                os.write(2, b"C++ speaks\n")
                print("somebody prints", flush=True)
                if failure == "Lost":  # and another rank of this host says it
                    raise errors.Lost("what went wrong\nin two lines", speaks=False)
                if failure:
                    raise getattr(errors, failure, ValueError)("what went wrong\nin two lines")
        except (errors.UserError, errors.Lost, ValueError):
            pass
        finally:
            sys.stdout.flush()
            os.dup2(before[0], 1)
            os.dup2(before[1], 2)
        return terminal.read_text(), log.log_of(folder, int(os.environ["RANK"])).read_text()


def test_every_rank_has_a_file_and_rank_0_the_terminal(crew: Any, tmp_path: Path) -> None:
    (terminal, file), (silent, others) = crew(2)(speak, tmp_path, None)
    for words in ("a library is worried", "UserWarning: a way of Python's"):
        assert file.count(words) == others.count(words) == terminal.count(words) == 1  # however often it was said
    assert "a library chats" not in terminal + file + others
    assert "a line of ours\n" in terminal
    assert "a line of ours\n" in file
    assert "C++ speaks" in terminal
    assert "C++ speaks\n" in others
    assert "somebody prints\n" in others
    assert silent == ""


@pytest.mark.parametrize("failure", ["UserError", "Lost", "ValueError"])
def test_a_failure_is_a_line_on_the_terminal_and_the_rest_in_the_file(crew: Any, tmp_path: Path, failure: str) -> None:
    (_, file), (silent, _) = crew(2)(speak, tmp_path, failure)
    assert "Traceback" in file
    assert "what went wrong" in file
    if failure == "ValueError":
        assert silent.count("\n") == 1
        assert "rank 1: ValueError: what went wrong; " in silent
        assert f"{tmp_path}/logs/rank-00001.log has more" in silent
    else:
        assert silent == ""  # rank 0 says a mistake, and one rank of each host that others are gone


def lonely(folder: Path) -> None:
    """A rank of its own that alone makes a mistake, of which rank 0 knows nothing."""
    from opt_parallel.runtime import errors, log

    os.environ.update(RANK="1", WORLD_SIZE="2")
    errors.time.sleep = lambda _: None  # type: ignore[attr-defined]
    with errors.reporting(), log.log_to_file(folder):
        raise errors.UserError("this rank cannot read part 7")


def test_a_mistake_that_only_one_rank_makes_is_said_by_it(tmp_path: Path) -> None:
    program = "import sys, pathlib, test_log; test_log.lonely(pathlib.Path(sys.argv[1]))"
    path = ":".join(str(folder) for folder in (ROOT, ROOT / "tests/runtime", ROOT / "tests/support"))
    process = python("-c", program, str(tmp_path), PYTHONPATH=path)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert process.stderr.endswith(", rank 1: this rank cannot read part 7\n")
    assert "UserError: this rank cannot read part 7" in (tmp_path / "logs" / "rank-00001.log").read_text()


def test_a_second_start_is_added(crew: Any, tmp_path: Path) -> None:
    crew(2)(speak, tmp_path, None)
    (_, file), _ = crew(2)(speak, tmp_path, None)
    assert file.count("--- 20") == 2


def test_bytes_in_words() -> None:
    assert [bytes_in_words(number) for number in (0, 999, 1500, 8_390_000, 2.5e9, 4.2e15)] == [
        "0 B", "999 B", "1.5 KB", "8.39 MB", "2.5 GB", "4,200 TB",
    ]  # fmt: skip
