"""Files and folders written beside their place: by several at once, killed, on disks that refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, environment, python
from faults import faults, why_not

from opt_parallel.storage import atomic
from opt_parallel.storage.atomic import new_file, new_folder, publish, remove, write_text

needs_faults = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_in_mid_write(path: Path) -> None:
    with new_file(path) as file:
        file.write(b"half")
        raise KeyError("a failure")


def fail_in_mid_folder(path: Path) -> None:
    with new_folder(path) as partial:
        (partial / "a").write_text("half")
        raise KeyError("a failure")


def test_absent_until_complete_and_gone_after_a_failure(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "deep" / "folder"
    with new_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    with new_folder(folder) as partial:
        (partial / "a").write_text("whole")
        assert not folder.exists()
    for fail, target in ((fail_in_mid_write, path), (fail_in_mid_folder, folder), (fail_in_mid_write, tmp_path / "b")):
        with pytest.raises(KeyError):
            fail(target)
    assert path.read_bytes() == b"whole"
    assert names_in(tmp_path) == ["deep", "file"]
    assert names_in(tmp_path / "deep") == ["folder"]
    assert names_in(folder) == ["a"]


def test_a_folder_gives_way_only_where_it_may(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("first", "second"):
        with new_folder(folder, replace=True) as partial:
            (partial / content).touch()
        assert names_in(folder) == [content]
    with pytest.raises(OSError, match="not empty"), new_folder(folder) as partial:
        (partial / "third").touch()
    assert names_in(folder) == ["second"]
    assert names_in(tmp_path) == ["folder"]


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def be_slower() -> None:
        with new_file(path, replace=False) as file:
            file.write(b"mine")
            path.write_text("another was faster")

    with pytest.raises(FileExistsError):
        be_slower()
    assert path.read_text() == "another was faster"
    assert names_in(tmp_path) == ["file"]
    path.unlink()
    write_text(path, "mine", replace=False)
    assert names_in(tmp_path) == ["file"]


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("there")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "text"
    reader, writer = os.pipe()
    write_text(Path(f"/dev/fd/{writer}"), "text")
    assert os.read(reader, 10) == b"text"
    write_text(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    for special in ("best", "other"):
        (tmp_path / special).symlink_to("/dev/null") if special == "best" else os.mkfifo(tmp_path / special)
        write_text(tmp_path / special, "text")
        assert (tmp_path / special).read_text() == "text"
    assert Path("/dev/null").is_char_device()


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


WRITER = """
import sys, time
from pathlib import Path
from opt_parallel.storage.atomic import new_file, new_folder
path, kind, word = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
try:
    if kind == "file":
        with new_file(path) as file:
            file.write(word.encode() * 1000)
            print("half", flush=True); sys.stdin.read()
            file.write(word.encode() * 1000)
    else:
        with new_folder(path) as folder:
            (folder / "a").write_text(word * 1000)
            print("half", flush=True); sys.stdin.read()
            (folder / "b").write_text(word * 1000)
except OSError as error:
    print(error.strerror)
"""


def writer(path: Path, kind: str, word: str) -> subprocess.Popen[str]:
    """A process that has written half and waits for the end of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, kind, word], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_at_once_and_one_killed(tmp_path: Path, kind: str) -> None:
    """What is written stays whole whoever comes in between, and what the killed one left goes with the next."""
    path = tmp_path / "there"
    killed, living = writer(path, kind, "x"), writer(path, kind, "y")
    killed.kill()
    killed.wait()
    assert len(names_in(tmp_path)) == 2
    third = writer(path, kind, "z")
    assert len(names_in(tmp_path)) == 2  # the killed one's is gone, the living one's is not
    for process in (living, third):
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert said == ("" if kind == "file" or process is living else "Directory not empty\n")
    assert names_in(tmp_path) == ["there"]
    if kind == "file":
        assert path.read_text() == "z" * 2000  # the last
    else:
        assert {each.name: each.read_text() for each in path.iterdir()} == {"a": "y" * 1000, "b": "y" * 1000}


def test_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    process = writer(tmp_path / "there", "folder", "x")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert names_in(tmp_path) == []


def played(folder: Path, code: str, *rules: str) -> tuple[list[str], list[str]]:
    """What a program prints on a disk that refuses, and what lies in the folder then."""
    names = "new_folder, remove, write_text"
    lines = ("import sys", "from pathlib import Path", f"from opt_parallel.storage.atomic import {names}")
    program = "\n".join([*lines, "here = Path(sys.argv[1])", code])
    process = python("-c", program, str(folder), PYTHONPATH=str(ROOT), **faults(*rules))
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), names_in(folder)


TWO_FOLDERS = """
for name in ("one", "two"):
    with new_folder(here / name) as partial:
        (partial / "a").write_text("whole")
    write_text(here / f"{name}.txt", "whole")
"""


@needs_faults
@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS"])
def test_a_file_system_without_fsync_is_said_once(tmp_path: Path, name: str) -> None:
    printed, names = played(tmp_path, TWO_FOLDERS, f"fsync {name} *")
    assert names == ["one", "one.txt", "two", "two.txt"]
    assert len(printed) == 1
    assert "fsync" in printed[0]
    assert str(tmp_path) in printed[0]
    assert played(tmp_path / "none", "here.mkdir()", f"fsync {name} *") == ([], [])


@needs_faults
def test_a_disk_that_confirms_wrongly_is_an_error_and_a_name_unconfirmed_a_warning(tmp_path: Path) -> None:
    attempt = """
try:
    write_text(here / "a.txt", "whole")
except OSError as error:
    print(error.strerror)
"""
    assert played(tmp_path, attempt, "fsync EIO *.partial") == (["Input/output error"], [])
    printed, names = played(tmp_path, attempt, "fsync EIO */")
    assert names == ["a.txt"]
    assert len(printed) == 1
    assert printed[0].startswith("warning: ")


@needs_faults
def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path) -> None:
    """And as much of it goes as does."""
    for name in (".nfs1", "large", "small"):
        (tmp_path / "old" / "deep" / name).mkdir(parents=True)
    printed, names = played(tmp_path, 'print(remove(here / "old"), remove(here / "old"))', "remove EBUSY */.nfs1/")
    assert printed[-1] == "False False"
    assert len(printed) == 2
    assert str(tmp_path / "old") in printed[0]
    assert names == ["old"]
    assert names_in(tmp_path / "old" / "deep") == [".nfs1"]
    assert remove(tmp_path / "old")
    assert remove(tmp_path / "old")  # it is gone


@needs_faults
def test_without_hard_links(tmp_path: Path) -> None:
    code = """
for word in ("first", "second"):
    try:
        write_text(here / "file", word, replace=False)
    except FileExistsError:
        print("exists")
"""
    assert played(tmp_path, code, "link EPERM *") == (["exists"], ["file"])
    assert (tmp_path / "file").read_text() == "first"


@needs_faults
def test_without_locks_nothing_is_taken_for_a_leftover(tmp_path: Path) -> None:
    killed = writer(tmp_path / "there", "file", "x")
    killed.kill()
    killed.wait()
    _, names = played(tmp_path, 'write_text(here / "there", "whole")', "flock ENOSYS *")
    assert len(names) == 2
    write_text(tmp_path / "there", "whole")
    assert names_in(tmp_path) == ["there"]


def test_a_folder_whose_lock_a_killed_process_never_made_is_deleted_later(tmp_path: Path) -> None:
    """Until then it may be that of a writer that is about to make the lock, or to rename the folder."""
    old, new = (atomic.beside(tmp_path / "folder") for _ in range(2))
    for left in (old, new):
        left.mkdir()
    os.utime(old, (1, 1))
    with new_folder(tmp_path / "folder"):
        pass
    assert names_in(tmp_path) == sorted(["folder", new.name])


def test_publish(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    publish(tmp_path / "a", tmp_path / "c")
    assert names_in(tmp_path / "c") == ["b"]
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "a", tmp_path / "c")


def test_the_older_comes_back_where_the_newer_cannot_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "folder", os.rename
    with new_folder(folder) as partial:
        (partial / "first").touch()

    def refuse(old: Path, new: Path) -> None:
        if new == folder and (old / "second").exists():
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(atomic.os, "rename", refuse)
    with pytest.raises(OSError, match="Input"), new_folder(folder, replace=True) as partial:
        (partial / "second").touch()
    assert names_in(folder) == ["first"]
    assert names_in(tmp_path) == ["folder"]
