"""What an entry leads to: known endings are read, others refused or counted, nothing is read twice or unseen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opt_parallel.data.text.files import ENDINGS
from opt_parallel.data.text.sources import Corpus
from opt_parallel.data.text.unpacking import PACKED
from opt_parallel.runtime.errors import UserError

ROW = '{"text": "a row"}\n'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def find(*entries: str | Path) -> Corpus:
    return Corpus.find("data.train", [str(entry) for entry in entries])


def names(corpus: Corpus, folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in corpus.files]


def fails(*parts: str, entry: str | Path) -> None:
    with pytest.raises(UserError) as raised:
        list(find(entry).documents())
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value)


def fill(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    return folder


@pytest.mark.parametrize("name", ["A.JSONL", "a.ndjson", "a.Jsonlines", "a.json", "a.TXT"])
def test_endings_that_are_read(tmp_path: Path, name: str) -> None:
    fill(tmp_path, name)
    assert list(find(tmp_path / name).documents()) == (["a row"] if "txt" not in name.lower() else [ROW.rstrip()])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.html", ["a.html ends in .html, which is not read", ".jsonl, .ndjson"]),
        ("a.jsonl~", ["ends in .jsonl~"]),
        ("a.jsonl.bak", ["ends in .bak"]),
        ("a.arrow", ["ends in .arrow"]),
        ("a.jsonl.lz4", ["ends in .lz4"]),
        ("a.gz", ["has no ending that names its format"]),
        ("README", ["has no ending that names its format"]),
        ("a.tar.gz", ["is an archive", "unpack it"]),
        ("a.TGZ", ["is an archive"]),
        ("a.zip", ["is an archive"]),
        ("a.tar", ["is an archive"]),
    ],
)
def test_endings_that_are_not_read(tmp_path: Path, name: str, parts: list[str]) -> None:
    fill(tmp_path, name)
    fails("data.train=", *parts, entry=tmp_path / name)


def test_a_folder_counts_what_it_leaves_out(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "B.JSONL", "x.png", "y.PNG", "z.csv.bak", "_SUCCESS", "a.jsonl~", "sub/c.tar.gz")
    fill(tmp_path, ".git/config", "._a.jsonl", "sub/.ipynb_checkpoints/d.jsonl", "part.crc")
    (tmp_path / "empty.jsonl").touch()
    found = find(tmp_path)
    assert names(found, tmp_path) == ["B.JSONL", "a.jsonl", "empty.jsonl"]
    said = "3 hidden, 2 .png, 1 .bak, 1 .crc, 1 .jsonl~, 1 .tar.gz, 1 empty, 1 without an ending"
    assert found.left_out == said
    fails("contains no text: a folder is searched for .md", "left out: 1 .tar.gz, 1 hidden", entry=tmp_path / "sub")
    assert (
        find(f"{tmp_path}/*").left_out == "2 .png, 1 .bak, 1 .crc, 1 .jsonl~, 1 empty, 1 folders, 1 without an ending"
    )
    fails("*.png matches no file that is read", "left out: 1 .png", entry=f"{tmp_path}/*.png")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path, "x/a.jsonl", "y/b.jsonl")
    (tmp_path / "x/y").symlink_to("../y")
    (tmp_path / "x/again").symlink_to("../y")
    for loop in ("here", "there"):  # each would double the depth of the other
        (tmp_path / "x" / loop).symlink_to(".")
    (tmp_path / "x/c.jsonl").symlink_to("a.jsonl")
    for entry in (tmp_path / "x", f"{tmp_path}/x/**/*.jsonl", f"{tmp_path}/x/**"):
        assert sorted(path.name for path in find(entry).files) == ["a.jsonl", "b.jsonl"]
    assert names(find(tmp_path), tmp_path) == ["x/a.jsonl", "x/again/b.jsonl"]


def test_a_file_that_patterns_and_links_name_again_counts_once(tmp_path: Path) -> None:
    fill(tmp_path, "blobs/4d7a2146", "other/a.jsonl")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.jsonl").symlink_to("../blobs/4d7a2146")  # as the hub's cache has it
    found = find(tmp_path / "set", f"{tmp_path}/*/a.jsonl", tmp_path / "other/a.jsonl", tmp_path / "other")
    assert names(found, tmp_path) == ["other/a.jsonl", "set/a.jsonl"]


def test_patterns(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "b/a.jsonl", "b/c/a.jsonl", "b/.d/a.jsonl", ".e.jsonl", "x[1].jsonl", "y.jsonl/z.txt")

    def of(pattern: str) -> list[str]:
        return names(find(f"{tmp_path}/{pattern}"), tmp_path)

    assert of("*.jsonl") == ["a.jsonl", "x[1].jsonl"]
    assert of("**/a.jsonl") == ["a.jsonl", "b/a.jsonl", "b/c/a.jsonl"]
    assert of("b/**") == ["b/a.jsonl", "b/c/a.jsonl"]
    assert of("?/*/[ab].jsonl") == ["b/c/a.jsonl"]
    assert of(".*.jsonl") == [".e.jsonl"]
    assert of("x[[]1].jsonl") == of("x[1].jsonl") == ["x[1].jsonl"]
    assert of("y.jsonl") == ["y.jsonl/z.txt"]  # a folder of that name
    fails("matches no file", entry=f"{tmp_path}/none/*.jsonl")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: path.symlink_to("nothing"), "a.jsonl is a broken link: repair it or remove it"),
        (lambda path: path.symlink_to(path.name), "a.jsonl"),
        (os.mkfifo, "a.jsonl is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a.jsonl is not a regular file"),
    ],
)
@pytest.mark.parametrize("entry", [".", "*.jsonl", "a.jsonl"])
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], None], part: str, entry: str) -> None:
    """Opening a pipe would wait for ever."""
    fill(tmp_path, "b.jsonl")
    make(tmp_path / "a.jsonl")
    fails(part, entry=tmp_path / entry)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("mode", [0o000, 0o200, 0o400])
def test_a_folder_below_that_cannot_be_read(mode: int) -> None:
    """In a place that everybody can reach, as pytest's own is not."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = fill(Path(name), "a.jsonl", "below/deep/b.jsonl")
        folder.chmod(0o755)
        (folder / "below").chmod(mode)
        try:
            for entry in (folder, f"{folder}/**/*.jsonl", f"{folder}/*/*/b.jsonl"):
                with as_nobody():
                    fails("data.train", "below", "cannot be read", "Permission denied", entry=entry)
        finally:
            (folder / "below").chmod(0o755)


@pytest.mark.parametrize("entry", [".", "a.txt", "b.parquet", "*.txt"])
def test_pointers_of_git_lfs(tmp_path: Path, entry: str) -> None:
    for name in ("a.txt", "b.parquet"):
        (tmp_path / name).write_text(POINTER)
    fails("is a pointer of Git LFS, not the file", "git lfs pull", entry=tmp_path / entry)


def test_names_that_would_break_the_line(tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"a\nb\xff.jsonl")
    name.write_text(ROW + "oops\n")
    with pytest.raises(UserError) as raised:
        list(find(tmp_path).documents())
    assert r"a\nb\udcff.jsonl, line 2 is not JSON" in str(raised.value)
    str(raised.value).encode()
    name.write_text(ROW)
    assert list(find(tmp_path).documents()) == ["a row"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train.jsonl", "test.jsonl"], "test.jsonl and train.jsonl"),
        (["data/train-00000-of-00001.parquet", "data/validation-0.parquet"], "train-00000-of-00001"),
        (["train/a.csv", "dev/b.csv"], "dev/b.csv and train/a.csv"),
    ],
)
def test_a_test_split_is_not_trained_on_by_mistake(tmp_path: Path, files: list[str], told: str) -> None:
    fails("contains files of several splits", told, "split: train", entry=fill(tmp_path, *files))


@pytest.mark.parametrize("files", [["train.jsonl", "more.jsonl"], ["train.py", "test.py"], ["test.jsonl", "dev.jsonl"]])
def test_names_that_tell_no_two_splits(tmp_path: Path, files: list[str]) -> None:
    assert len(find(fill(tmp_path, *files)).files) == 2


def test_every_ending_is_one_of_the_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    assert not [ending for ending in (*ENDINGS, *PACKED) if f"`{ending}`" not in page]
