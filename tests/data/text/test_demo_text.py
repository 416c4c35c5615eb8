"""The script that makes text to try things out with: the same bytes each time, and no copy across the split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from opt_parallel.data.text.python_text import NEAR_DUPLICATE, SHINGLE_WORDS, split

SCRIPT = Path(__file__).parents[3] / "scripts" / "demo_text.py"


def page(number: int) -> str:
    """Sixty words that no other page has."""
    return " ".join(f"word{number}x{place}" for place in range(60))


def held_out(text: str) -> bool:
    """Whether the split would hold out `text`, were there no other."""
    return split([text])[1] == [text]


PAGES = [page(number) for number in range(200)]
TRAINED = next(text for text in PAGES if not held_out(text))
# all but equal to a page of training text, case and punctuation too, and yet chosen for validation
PLANTED = next(text for text in (f"{TRAINED.title()}. The end, {n}!" for n in range(1000)) if held_out(text))
DOCUMENTS = [*PAGES, TRAINED, PLANTED]


def run(*arguments: str | Path, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def make(folder: Path, hash_seed: int) -> str:
    """Fill `folder / "output"` from a source of `DOCUMENTS`; what the script printed."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    for number, text in enumerate(DOCUMENTS):
        (source / f"{number}.txt").write_text(text + "\n", encoding="utf-8")
    done = run("--output", folder / "output", "--source", source, hash_seed=hash_seed)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def shingles(text: str) -> set[str]:
    """As the script's, the plain way: these pages hold no punctuation but the planted one's."""
    words = text.lower().replace(".", "").replace(",", "").replace("!", "").split()
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(len(words) - SHINGLE_WORDS + 1)}


def test_documents_are_split_and_a_planted_copy_is_removed(tmp_path: Path) -> None:
    said = make(tmp_path, hash_seed=1)
    train, validation = (read(tmp_path / "output" / f"{name}.jsonl") for name in ("train", "validation"))
    assert train.count(TRAINED) == 2  # exact copies stay together
    assert Counter(train) + Counter(validation) + Counter([PLANTED]) == Counter(DOCUMENTS)
    assert f"train {len(train)} documents" in said
    assert f"validation {len(validation)} documents" in said
    assert "1 near-duplicates of training text removed" in said
    seen = set().union(*map(shingles, train))
    assert len(shingles(PLANTED) & seen) > NEAR_DUPLICATE * len(shingles(PLANTED))
    assert not any(shingles(text) & seen for text in validation)


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = []
    for hash_seed in (1, 2):
        folder = tmp_path / str(hash_seed)
        folder.mkdir()
        make(folder, hash_seed)
        made.append({path.name: path.read_bytes() for path in (folder / "output").iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {"train.jsonl", "validation.jsonl"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "none is not a folder: name a folder with text files"), ("one", "one has too little text to split")],
)
def test_a_source_that_does_not_serve(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "only.txt").write_text("one document")
    failed = run("--output", tmp_path / "output", "--source", tmp_path / name)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert message in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: ")
    assert not (tmp_path / "output").exists()
