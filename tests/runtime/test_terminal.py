"""Programs on real pipes and terminals that close, fill up or lack characters."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, environment

# A run of three lines, the last two after its terminal was dealt with; then what others print, and the end.
RUN = """
import os, sys, warnings
from pathlib import Path
from opt_parallel.runtime import log, terminal
from opt_parallel.runtime.errors import reporting
terminal.READ_TIMEOUT = 0.3
with reporting():
    terminal.outlive()
    with log.log_to_file(Path(sys.argv[1])):
        log.quiet_libraries()
        log.say("before")
        sys.stdin.readline()
        for words in sys.argv[2:]:
            log.say(words)
        os.write(1, b"C++ speaks") if not sys.argv[3:] else None
        print("others print")
        print("errors", file=sys.stderr)
        sys.stdin.readline()
        log.say("at the end")
"""
# A command that only prints.
SCRIPT = """
import sys
from opt_parallel.runtime.errors import reporting
with reporting():
    print(sys.argv[1], flush=len(sys.argv) > 2)
    sys.stdin.readline()
    print(sys.argv[1], flush=len(sys.argv) > 2)
"""


def start(program: str, *arguments: str, out: int, err: int = subprocess.PIPE, **env: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT), **env), stdin=subprocess.PIPE, stdout=out, stderr=err
    )


def go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def log_of(folder: Path) -> list[str]:
    return (folder / "logs" / "rank-00000.log").read_text(encoding="utf-8").splitlines()[1:]


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "both"])
def test_a_run_goes_on_when_its_terminal_is_gone(tmp_path: Path, kind: str, both: bool) -> None:
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    with start(RUN, str(tmp_path), "after", out=writer, err=writer if both else subprocess.PIPE) as process:
        os.close(writer)
        assert b"before" in os.read(reader, 100)
        os.close(reader)
        _, errors = process.communicate(b"\n\n", timeout=60)
    assert process.returncode == 0
    before, warning, *rest = [line for line in log_of(tmp_path) if "standard error" not in line]
    assert before == "before"
    assert warning.startswith("warning: standard output cannot be written (")
    assert rest == ["after", "at the end"]
    if not both:
        assert errors.decode().splitlines() == [warning, "errors"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_closed_from_the_start_gets_no_file_of_ours(tmp_path: Path, closed: str) -> None:
    line = f"exec {sys.executable} -c '{RUN}' {tmp_path} after {closed}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), input="\n\n", capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "" if "2>" in closed else "errors\n")
    names = {">&-": "output", "2>&-": "error"}
    warnings = [f"warning: standard {name} is closed" for sign, name in names.items() if sign in closed.split()]
    assert log_of(tmp_path) == [*warnings, "before", "after", "at the end"]


def test_a_file_without_room(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full, start(RUN, str(tmp_path), "after", out=full.fileno()) as process:
        _, errors = process.communicate(b"\n\n", timeout=60)
    assert process.returncode == 0
    assert errors.startswith(b"warning: standard output cannot be written (No space left on device)")
    assert log_of(tmp_path)[1:] == ["before", "after", "at the end"]


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", rb"caf\xe9 \u65e5\u672c \ud83d"), ("iso-8859-1", b"caf\xe9 \\u65e5\\u672c \\ud83d"),
        ("utf-8", "café 日本 \\ud83d".encode()), ("ascii:replace", b"caf? ?? ?"),  # as the user asked
    ],
)  # fmt: skip
def test_characters_that_the_encoding_lacks(tmp_path: Path, encoding: str, printed: bytes) -> None:
    program = RUN.replace("sys.argv[2:]", r"['café 日本 \ud83d']")
    with start(program, str(tmp_path), out=subprocess.PIPE, PYTHONIOENCODING=encoding) as process:
        output, errors = process.communicate(b"\n\n", timeout=60)
    assert (process.returncode, errors) == (0, b"errors\n")
    assert output.splitlines()[1] == printed
    assert log_of(tmp_path)[1] == "café 日本 \\ud83d"


def test_a_reader_that_does_not_read_holds_nothing_up(tmp_path: Path) -> None:
    """And is served again when it reads again."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    with start(RUN, str(tmp_path), "x" * size, "after", out=writer) as process:
        os.close(writer)
        go_on(process)
        assert process.stderr is not None
        assert process.stderr.readline() == b"errors\n"
        shown = os.read(reader, size)
        assert shown.startswith(b"before\nxxx")
        go_on(process)
        process.wait(timeout=60)
        rest = os.read(reader, size)
    os.close(reader)
    assert process.returncode == 0
    assert rest.endswith(b"at the end\n")
    assert b"after" not in shown + rest
    warnings = [line for line in log_of(tmp_path) if line.startswith("warning")]
    assert [line.split("standard output ")[1][:7] for line in warnings] == ["was not", "is read"]
    assert "after" in log_of(tmp_path)


def test_a_terminal_that_somebody_made_non_blocking(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    size = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    with start(SCRIPT.replace("sys.argv[1]", f"'x' * {2 * size}"), "words", "flush", out=writer) as process:
        os.close(writer)
        go_on(process)
        read = 0
        while chunk := os.read(reader, size):
            read += len(chunk)
    os.close(reader)
    assert (process.returncode, read) == (0, 2 * (2 * size + 1))


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("flushed", [["flush"], []], ids=["at-once", "at-the-end"])
def test_a_script_that_only_prints_ends_without_a_word(kind: str, flushed: list[str]) -> None:
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    with start(SCRIPT, "words", *flushed, out=writer) as process:
        os.close(writer)
        os.close(reader)
        _, errors = process.communicate(b"\n", timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, b"")


def test_a_script_whose_output_has_no_room_says_so() -> None:
    with open("/dev/full", "wb") as full, start(SCRIPT, "words", out=full.fileno()) as process:
        _, errors = process.communicate(b"\n", timeout=60)
    assert process.returncode == 2
    assert errors == b"error: standard output cannot be written (No space left on device)\n"


HOSTILE = "a\\x1b[31mred\\x1b[0m\\x1b[8m\\x1b]0;title\\x07\\x1b[2J\\x9b1m\\x08\\0\\rb\\u202ec\\td"
SHOWN = r"ared\x1b]0;title\x07\x1b[2J\x9b1m\x08\x00\rb\u202ec" + "\td"


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_control_characters_are_printed_as_escapes(kind: str) -> None:
    """Of a label, a file's name, a sample, a library's message."""
    program = f"""
import sys
from opt_parallel.runtime.errors import UserError, reporting
with reporting():
    print("{HOSTILE}")
    print("a" + chr(13) + chr(10) + "b", chr(13) + "bar", chr(27) + "[A", sep="", flush=True)
    sys.stderr.write(chr(27) + "[A")
    raise UserError("{HOSTILE}")
"""
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    with start(program, out=writer) as process:
        _, errors = process.communicate(timeout=60)
        os.close(writer)
        output = os.read(reader, 10_000).decode().replace("\r\n", "\n").split("\n")
    os.close(reader)
    assert process.returncode == 2
    output[1] = output[1].rstrip("\r")  # a terminal has another
    assert output[:3] == [SHOWN, "a", "b\rbar\x1b[A"]  # writes of their own, as a progress bar has them
    assert errors.decode() == f"\x1b[Aerror: {SHOWN}\n"
