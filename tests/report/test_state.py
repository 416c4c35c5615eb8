"""The file `state` of a run's folder is written anew, whatever it holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opt_parallel.run_folder import STATE, write_state


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", bytes(4096), b"running", b"done\n\n", b"[" * 10**6])
def test_whatever_it_holds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    write_state(tmp_path, "done")
    assert (tmp_path / STATE).read_bytes() == b"done\n"


def test_a_folder_in_its_place_is_said_and_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / STATE).mkdir()
    write_state(tmp_path, "done")
    assert str(tmp_path / STATE) in capsys.readouterr().out
    assert os.listdir(tmp_path) == [STATE]
