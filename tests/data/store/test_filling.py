"""A store filled by several processes is the one that is filled by one; what was whole when it was killed stays."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT, environment
from encoders import Watched

from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.store import build as filling
from opt_parallel.data.store import selection, workers
from opt_parallel.data.store.build import Recipe, fill
from opt_parallel.data.store.selection import digests_of, find_duplicates
from opt_parallel.data.store.workers import Pulse, Unfinished, run_jobs
from opt_parallel.data.text import files, sources
from opt_parallel.data.text.records import Text
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.errors import UserError

TOKENIZER = train_tokenizer(["some words to learn from, and some more words"] * 3, 280)


def corpus_of(folder: Path, texts: list[str]) -> Corpus:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus.find("data.train", [str(path)])


def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, sources):
        monkeypatch.setattr(module, "PIECE_BYTES", 300)
    monkeypatch.setattr(filling, "WORTH_A_PROCESS", 1)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


TEXTS = [f"document {number} has some words and no more" for number in range(60)]


def test_several_processes_fill_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch)
    recipe = Recipe(corpus_of(tmp_path, TEXTS), TextEncoder(TOKENIZER, 2), Text(), deduplicate=True)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, processes in ((one, 1), (two, 2)):
        folder.mkdir()
        metas = fill(folder, [recipe], processes)
        assert len(metas) > 5
        assert sum(meta.part.documents for meta in metas) == len(TEXTS)
    assert bytes_of(one) == bytes_of(two)


def test_a_process_that_is_killed_costs_only_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch)
    corpus, log, target = corpus_of(tmp_path, TEXTS), tmp_path / "log", tmp_path / "store"
    target.mkdir()
    with pytest.raises(Unfinished, match=r"was killed, .* fewer than data.workers=2; completed parts are kept"):
        fill(target, [Recipe(corpus, Watched(TOKENIZER, log, "document 40 ", "kill"))], 2)
    kept = {path.name: path.stat().st_ino for path in target.glob("part-?????")}
    assert len(kept) >= 2
    documents = [json.loads((target / name / "part.json").read_text())["part"]["documents"] for name in kept]
    log.unlink()
    fill(target, [Recipe(corpus, Watched(TOKENIZER, log))], 1)
    assert {name: (target / name).stat().st_ino for name in kept} == kept
    assert len(log.read_text().splitlines()) == len(TEXTS) - sum(documents)  # nothing that was whole is done again
    straight = tmp_path / "straight"
    straight.mkdir()
    fill(straight, [Recipe(corpus, Watched(TOKENIZER, log))], 1)
    assert bytes_of(target) == bytes_of(straight)


@pytest.mark.parametrize(
    ("action", "how"), [("stop", "is stopped"), pytest.param("hang", "does nothing", marks=pytest.mark.long)]
)
def test_a_process_that_does_nothing_is_named_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], action: str, how: str
) -> None:
    small_units(monkeypatch)
    monkeypatch.setattr(workers, "LOOK", 0.2)
    corpus, log, target = corpus_of(tmp_path, TEXTS), tmp_path / "log", tmp_path / "store"
    target.mkdir()
    with pytest.raises(Unfinished, match=rf"process \d+ on .*, which prepares .*text.jsonl, {how} for 2.4 s: .*again"):
        fill(target, [Recipe(corpus, Watched(TOKENIZER, log, "document 40 ", action))], 2)
    said = capsys.readouterr().out
    assert f"text.jsonl, {how}: the run ends" in said
    assert "for 2.4 s\n" in said
    assert len(list(target.glob("part-?????"))) > 5
    fill(target, [Recipe(corpus, Watched(TOKENIZER, tmp_path / "again"))], 1)  # goes on from there
    assert len((tmp_path / "again").read_text().splitlines()) < len(TEXTS) / 2


def test_a_sign_of_life_counts_from_anew() -> None:
    """Looks count and not seconds, so that a process that was stopped itself, as by Ctrl-Z, gives nobody up."""
    burn = "import sys\nfor _ in sys.stdin: sum(range(2000000)); print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        pulse = Pulse(child.pid)
        for _ in range(2):
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            for _ in range(workers.GIVEN_UP):
                pulse.look("which burns")
        with pytest.raises(Unfinished, match="which burns, does nothing for"):
            pulse.look("which burns")


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from opt_parallel.data.store import build as filling
from opt_parallel.data.text import files, sources
from opt_parallel.data.encode.tokenizer import load_tokenizer
from opt_parallel.data.store.build import Recipe, fill
from opt_parallel.data.text.sources import Corpus
from encoders import Watched
if __name__ == "__main__":
    files.PIECE_BYTES = sources.PIECE_BYTES = 300
    filling.WORTH_A_PROCESS = 1
    folder = Path(sys.argv[1])
    encoder = Watched(load_tokenizer(folder / "tokenizer"), folder / "log", "document 58 ", "slow")
    fill(folder / "store", [Recipe(Corpus.find("data.train", [str(folder / "text.jsonl")]), encoder)], 2)
"""


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Killed, it can tell them nothing; one has nothing to do then, one is at work."""
    corpus_of(tmp_path, TEXTS)
    (tmp_path / "store").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests" / "support")))
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=environment(PYTHONPATH=str(ROOT))
    ) as process:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "store").glob("part-?????"))) < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        below = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert len(below) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{number}").exists() for number in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{number}").exists() for number in below)


@pytest.mark.parametrize(
    ("processes", "deduplicate"), [(1, True), (2, False), pytest.param(2, True, marks=pytest.mark.long)]
)
def test_a_mistake_in_the_middle_of_a_file_has_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, deduplicate: bool
) -> None:
    small_units(monkeypatch)
    corpus = corpus_of(tmp_path, TEXTS)
    path = corpus.files[0]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:37], "oops", *lines[38:]]) + "\n")
    (tmp_path / "store").mkdir()
    recipe = Recipe(corpus, TextEncoder(TOKENIZER, 2), deduplicate=deduplicate)
    with pytest.raises(UserError, match=f"{path}, line 38 is not JSON"):
        fill(tmp_path / "store", [recipe], processes)


def test_text_that_changes_meanwhile(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, TEXTS)
    (tmp_path / "store").mkdir()
    with pytest.raises(UserError, match=r"text.jsonl changed while it was read: "):
        fill(tmp_path / "store", [Recipe(corpus, Watched(TOKENIZER, tmp_path / "log", "document 30 ", "change"))], 1)


def broken(_: Any, report: Any) -> None:
    raise ZeroDivisionError("a mistake of ours")


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        run_jobs([("a job", broken)], None, 2, lambda _: None)
    assert "in broken" in raised.value.__notes__[0]


@pytest.mark.parametrize("bucket", [1 << 22, 3, 1])
def test_duplicates_over_files_and_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    monkeypatch.setattr(selection, "BUCKET", bucket)
    texts = [[b"a", b"b", b"a"], [], [b"c", b"b", b"d"], [b"d", b"e", b"a", b"e"]]
    digests, places = ([tmp_path / f"{kind}-{number}" for number in range(4)] for kind in ("digests", "places"))
    for path, contents in zip(digests, texts, strict=True):
        path.write_bytes(digests_of(contents).tobytes())
    find_duplicates(digests, places)
    assert [sorted(np.fromfile(path, "<i8").tolist()) for path in places] == [[2], [], [1], [0, 2, 3]]


def test_duplicates_in_more_files_than_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        limit = file.fileno() + 100  # counts numbers, and those that are taken need not follow each other
    digests, places = ([tmp_path / f"{kind}-{number}" for number in range(limit)] for kind in ("digests", "places"))
    for path in digests:
        path.write_bytes(digests_of([b"the same"]).tobytes())
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        find_duplicates(digests, places)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [np.fromfile(path, "<i8").tolist() for path in places] == [[], *([[0]] * (limit - 1))]


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with workers.progress("data.train: encoding", 4_000_000) as report:
        report(1_000_000)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(workers, "INTERVAL", 0.0)
        report(1_000_000)
    assert capsys.readouterr().out == "data.train: encoding: 50% of 4 MB\n"
