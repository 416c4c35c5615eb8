"""Measure the preparation of a large text by this package and by `datasets.map` with the same tokenizer. This package
and datasets take turns, each in new processes. The benchmark also kills our preparation half-way and starts it
again."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from opt_parallel.data.encode.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from opt_parallel.data.store.store import TokenStore
from opt_parallel.data.text.python_text import python_documents
from opt_parallel.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CHANGED = 0.05  # Share of the words that are changed in each copy of a document.
SAMPLE_EVERY = 0.05  # Seconds between two readings of memory use.


@dataclass(frozen=True)
class Measured:
    """The seconds of a command and its peak memory in bytes. `parent` is the peak memory of the command's first
    process, and `together` is that of this process and its children."""

    seconds: float
    parent: int
    together: int


def write_corpus(path: Path, size: int) -> None:
    """Write `size` bytes of JSON lines. The lines repeat Python's documentation, and random words are replaced in each
    copy."""
    documents = list(python_documents())
    words = sorted({word for document in documents for word in document.split(" ") if word.isalpha()})
    draw, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            document = draw.choice(documents).split(" ")
            for index in draw.sample(range(len(document)), int(CHANGED * len(document))):
                document[index] = draw.choice(words)
            line = json.dumps({"text": " ".join(document)}) + "\n"
            file.write(line)
            written += len(line)


def measure(folder: Path, size: int, workers: int, vocab_size: int, rounds: int) -> list[list[str]]:
    """The rows of the table. Raises: UserError if this package and datasets count different numbers of tokens."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        here = Path(temporary)
        write_corpus(here / "text.jsonl", size)
        save_tokenizer(train_tokenizer(python_documents(), vocab_size), here / "tokenizer")
        ours, theirs, loading = [], [], []
        tokens = 0
        for _ in range(rounds):
            shutil.rmtree(here / "cache", ignore_errors=True)
            ours.append(watched(_ours(here, workers)))
            store = _store(here)
            tokens = store.tokens
            shutil.rmtree(here / "theirs", ignore_errors=True)
            total = watched([sys.executable, __file__, str(here), str(workers)])
            figures = json.loads((here / "theirs.json").read_text())
            if figures["tokens"] + store.documents != tokens:  # our token stores end each document with a token
                raise UserError(
                    f"{figures['tokens']} tokens and {store.documents} document ends differ from our {tokens} tokens"
                )
            theirs.append(Measured(figures["map"], total.parent, total.together))
            loading.append(figures["load"])
            print(
                f"ours {ours[-1].seconds:.1f} s, datasets.map {figures['map']:.1f} s, loading {figures['load']:.1f} s"
            )
        ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
        with_loading = [(b.seconds + load) / a.seconds for a, b, load in zip(ours, theirs, loading, strict=True)]
        rows = [["", "seconds", "tokens/s", "peak of all", "of the parent"]]
        rows += [_row("ours", ours, tokens), _row("datasets.map alone", theirs, tokens)]
        rows.append(["ours ÷ it, in tokens/s", _spread(ratios, "{:.2f}")])
        rows.append(["ours ÷ it with its loading", _spread(with_loading, "{:.2f}")])
        rows += _killed(here, workers)
    widest = max(map(len, rows))
    return [row + [""] * (widest - len(row)) for row in rows]


def watched(command: list[str], until: Callable[[], bool] = lambda: False) -> Measured:
    """Run a command to its end, or kill it as soon as `until()` is true. Raises: UserError if the command fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    started, parent, together = time.perf_counter(), 0, 0
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        watching = psutil.Process(process.pid)
        while process.poll() is None:
            if until():
                process.kill()
                break
            held = []
            for each in (watching, *_below(watching)):
                try:
                    held.append(each.memory_info().rss)
                except psutil.Error:  # the process has just ended
                    continue
            parent, together = max(parent, *held[:1], 0), max(together, sum(held))
            time.sleep(SAMPLE_EVERY)
        status = process.wait()
    if status > 0:
        raise UserError(f"{' '.join(command)} ended with status {status}")
    return Measured(time.perf_counter() - started, parent, together)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _ours(here: Path, workers: int) -> list[str]:
    size = load_tokenizer(str(here / "tokenizer")).get_vocab_size()
    return [
        sys.executable, "opt-parallel prepare", "model=opt-tiny", f"model.vocab_size={size}",
        f"data.train={here / 'text.jsonl'}", f"data.tokenizer={here / 'tokenizer'}", f"data.cache={here / 'cache'}",
        f"data.workers={workers}",
    ]  # fmt: skip


def _store(here: Path) -> TokenStore:
    return TokenStore(next(path for path in (here / "cache").glob("store-*") if path.is_dir()))


def _killed(here: Path, workers: int) -> list[list[str]]:
    """Kill our preparation half-way and start it again. Raises: UserError unless the result has the same bytes as
    without the kill, and the finished parts are kept."""
    store = _store(here)
    expected = {path.relative_to(store.folder): path.read_bytes() for path in store.folder.rglob("*.bin")}
    shutil.rmtree(here / "cache")
    finished = "store-*.partial/part-?????/part.json"
    half = len(store.parts) // 2
    watched(_ours(here, workers), until=lambda: len([*(here / "cache").glob(finished)]) >= half)
    kept = {path.parent.name: path.stat().st_mtime_ns for path in (here / "cache").glob(finished)}
    again = watched(_ours(here, workers))
    store = _store(here)
    untouched = all((store.folder / part / "part.json").stat().st_mtime_ns == when for part, when in kept.items())
    same = all((store.folder / path).read_bytes() == content for path, content in expected.items())
    if not (untouched and same and kept):
        raise UserError(
            f"the restarted preparation kept {len(kept)} parts, unchanged: {untouched}, with equal bytes: {same}"
        )
    return [[f"killed half-way with {len(kept)} of {len(store.parts)} parts, again", f"{again.seconds:.1f}"]]


def _row(name: str, measured: list[Measured], tokens: int) -> list[str]:
    return [
        name,
        _spread([each.seconds for each in measured], "{:.1f}"),
        _spread([tokens / each.seconds for each in measured], "{:,.0f}"),
        _spread([each.together / 1e9 for each in measured], "{:.2f} GB"),
        _spread([each.parent / 1e9 for each in measured], "{:.2f} GB"),
    ]


def _spread(values: list[float], form: str) -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}–{form.format(max(values))})"


def theirs(here: Path, workers: int) -> None:
    """Read the text with `datasets`, tokenize it with `datasets.map`, and write the times to theirs.json."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    started = time.perf_counter()
    text = datasets.load_dataset(
        "json", data_files=str(here / "text.jsonl"), split="train", cache_dir=str(here / "theirs")
    )
    loaded = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(here / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text.rstrip() for text in rows["text"]]
        return {"ids": [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]}

    mapped = text.map(encode, batched=True, num_proc=workers, remove_columns=text.column_names)
    done = time.perf_counter()
    tokens = sum(len(chunk.flatten()) for chunk in mapped.data.column("ids").chunks)
    figures = {"load": loaded - started, "map": done - loaded, "tokens": tokens}
    (here / "theirs.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    theirs(Path(sys.argv[1]), int(sys.argv[2]))
