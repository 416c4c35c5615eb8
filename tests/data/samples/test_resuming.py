"""Sources, weights and rows that changed when a run goes on: each source goes on exactly where it stands."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command import SMALL, train_rows, write_text
from stores import counting_rows
from training import trained

from opt_parallel.checkpoint.damage import tokenizer_of
from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.data.prepare import Prepared, PreparedSource
from opt_parallel.data.resuming import resumed_clock
from opt_parallel.data.samples.mixture import Mixture
from opt_parallel.data.tasks import open_mixture
from opt_parallel.runtime.clock import Clock

LENGTH = 4
SIZES = {"web": 100, "books": 70, "code": 17, "wiki": 40}
Weights = dict[str, str]
Seen = list[tuple[str, int]]  # of each sample of a run, its text and its row


class Trained:
    """A run as its samples tell: what it has seen, where it stands, what its checkpoint says."""

    def __init__(self, folder: Path, **weights: str) -> None:
        """`weights` by name; a name such as `journal_is_web` is one of another's text."""
        self.folder, self.seen = folder, list[tuple[str, int]]()
        self.weights, self.seed, self.length, self.clock = weights, 3, LENGTH, Clock()

    def change(self, seed: int | None = None, length: int | None = None, **weights: str) -> Trained:
        """Stop, and go on with these settings."""
        manifest: Any = {
            "clock": json.loads(json.dumps(asdict(self.clock))),
            "text": self.prepared.text,
            "config": {
                "seed": self.seed,
                "data": {"train": self.run.data.train, "sequence_length": self.length},
            },
        }
        self.weights, self.seed, self.length = weights, seed or self.seed, length or self.length
        self.clock = resumed_clock(self.run, self.prepared.train, manifest)
        return self

    @property
    def run(self) -> Run:
        train = [{"path": name, "weight": weight} for name, weight in self.weights.items()]
        return Run(
            model=ModelConfig(max_position_embeddings=2048),
            data=DataConfig(train=train, sequence_length=self.length),
            seed=self.seed,
        )

    @property
    def prepared(self) -> Prepared:
        sources = []
        for name, weight in self.weights.items():
            text = name.split("_is_")[-1]
            if not (store := self.folder / f"store-{text}").exists():
                counting_rows(store, SIZES[text], LENGTH)
            sources.append(PreparedSource(name, Fraction(weight), store, (store.name,)))
        return Prepared(sources, None, self.folder)

    @property
    def mixture(self) -> Mixture:
        return open_mixture(self.run, self.prepared, self.clock)

    def go(self, samples: int) -> Trained:
        mixture = self.mixture
        for position in range(self.clock.samples, self.clock.samples + samples):
            name = mixture.sources[mixture.locate(position)[0]].name
            self.seen.append((name.split("_is_")[-1], int(mixture.sample(position).ids[0]) // LENGTH))
        self.clock = self.clock.after(samples, samples * LENGTH)
        return self

    def rows(self, text: str) -> list[int]:
        return [row for name, row in self.seen if name == text]


def goes_through(rows: list[int], size: int) -> bool:
    """Whether each epoch has every row once."""
    epochs = [rows[start : start + size] for start in range(0, len(rows), size)]
    return all(len(set(epoch)) == len(epoch) for epoch in epochs)


def test_other_weights_leave_each_source_where_it_stands(tmp_path: Path) -> None:
    straight = Trained(tmp_path, web="0.6", books="0.3", code="0.1").go(1000)
    run = Trained(tmp_path, web="0.6", books="0.3", code="0.1").go(137)
    before = run.mixture.epochs(run.clock.samples)
    run.change(web="1", books="1", code="2").go(200).change(web="3", books="1", code="1").go(150)
    assert run.seen[:137] == straight.seen[:137]
    for name in ("web", "books", "code"):
        rows = run.rows(name)
        assert rows == straight.rows(name)[: len(rows)] or len(rows) > len(straight.rows(name))
        assert goes_through(rows, SIZES[name])
    assert Counter(name for name, _ in run.seen[137:337]) == {"web": 50, "books": 50, "code": 100}
    assert Counter(name for name, _ in run.seen[337:]) == {"web": 90, "books": 30, "code": 30}
    after = run.mixture.epochs(run.clock.samples)
    assert all(after[name] >= before[name] for name in before)


def test_a_source_is_added_to_one_that_was_alone(tmp_path: Path) -> None:
    """Whose order was drawn by the seed alone."""
    alone = Trained(tmp_path, web="1").go(90)
    straight = Trained(tmp_path, web="1").go(200).rows("web")
    mixed = alone.change(books="1", web="2").go(60)
    assert mixed.rows("web") == straight[: 90 + 40]
    assert mixed.change(web="1").go(30).rows("web") == straight[: 90 + 40 + 30]


def test_a_source_that_is_left_out_and_comes_back(tmp_path: Path) -> None:
    straight = Trained(tmp_path, web="1", code="1").go(200)
    run = Trained(tmp_path, web="1", code="1").go(20).change(web="1").go(13)
    run = run.change(web="1", wiki="1").go(24).change(web="1", wiki="1", code="2").go(40)
    assert run.rows("code") == straight.rows("code")[:30]
    assert run.rows("web") == straight.rows("web")[: 10 + 13 + 12 + 10]
    assert (len(run.rows("wiki")), goes_through(run.rows("wiki"), SIZES["wiki"])) == (22, True)


def test_nothing_changed_is_the_straight_run(tmp_path: Path) -> None:
    """Also after a change: the turns go on in the middle of the cycle. Weights of the same shares are the same."""
    straight = Trained(tmp_path, web="0.6", books="0.4").go(50).change(web="1", books="4").go(100)
    run = Trained(tmp_path, web="0.6", books="0.4").go(17).change(web="3", books="2").go(33)
    run = run.change(web="1", books="4").go(3).change(web="0.2", books="0.8").go(97)
    assert run.seen == straight.seen
    assert replace(run.clock, step=0) == replace(straight.clock, step=0)


def test_a_text_by_another_name_is_the_same_source(tmp_path: Path) -> None:
    straight = Trained(tmp_path, web="0.6", books="0.4").go(150)
    run = Trained(tmp_path, web="0.6", books="0.4").go(51).change(journal_is_web="0.6", books="0.4").go(49)
    assert run.change(journal_is_web="0.6", news_is_books="0.4").go(50).seen == straight.seen
    alone = Trained(tmp_path, web="1").go(20).change(a_is_web="1").go(20)
    assert alone.seen == Trained(tmp_path, web="1").go(40).seen


def test_a_name_that_another_text_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where its own text goes on under another name, the new one begins."""
    run = Trained(tmp_path, web="1", books="1").go(40).change(more_is_web="1", web_is_code="1", books="1")
    assert run.mixture.taken(40) == {"more_is_web": 20, "web_is_code": 0, "books": 20}
    run = Trained(tmp_path, web="1", books="1").go(40).change(web="1", books="1")
    assert "warning" not in capsys.readouterr().out
    run = Trained(tmp_path, a_is_web="1", books="1").go(40).change(books="1", a_is_web="1")
    assert "a_is_web after 20 samples" in capsys.readouterr().out


def test_what_cannot_go_on_exactly_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Trained(tmp_path, web="1", books="1").go(60)
    manifest_text = run.prepared.train[0].store
    run.change(seed=4, web="1", books="1")
    assert "warning: seed=4, but the checkpoint has seed=3: " in capsys.readouterr().out
    assert run.clock == Trained(tmp_path, web="1", books="1").go(60).clock
    manifest_text.rename(tmp_path / "store-gone")
    counting_rows(tmp_path / "store-other", 90, LENGTH)
    SIZES["other"] = 90
    sources = [PreparedSource("web", Fraction(1), tmp_path / "store-other", ("store-other",)), *run.prepared.train[1:]]
    manifest = {
        "clock": asdict(run.clock), "text": {"web": "store-web", "books": "store-books"},
        "config": {"seed": 4, "data": {"train": run.run.data.train, "sequence_length": LENGTH}},
    }  # fmt: skip
    assert resumed_clock(run.run, sources, manifest) == run.clock
    said = capsys.readouterr().out
    assert said.startswith("warning: the training text of web differs from the checkpoint's")


def test_longer_rows_go_on_after_as_many_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Trained(tmp_path, web="3", books="1").go(84)
    epochs = run.mixture.epochs(84)
    run.change(length=8, web="3", books="1")
    assert "warning: data.sequence_length=8, but the checkpoint has 4" in capsys.readouterr().out
    assert run.mixture.taken(84) == {"web": 32, "books": 11}
    assert run.mixture.epochs(84) == {name: pytest.approx(epochs[name], abs=0.02) for name in epochs}
    assert run.change(length=8, web="3", books="1").clock.mixed == 84
    assert run.change(length=4, web="3", books="1").mixture.taken(84) == {"web": 64, "books": 22}


def test_a_checkpoint_from_before(tmp_path: Path) -> None:
    """Whose clock says nothing of sources: they began with the run."""
    run = Trained(tmp_path, web="2", books="1").go(30)
    manifest = {
        "clock": {"step": 1, "samples": 30, "tokens": 120},
        "config": {"seed": 3, "data": {"train": run.run.data.train, "sequence_length": LENGTH}},
    }
    assert resumed_clock(run.run, run.prepared.train, manifest) == Clock(1, 30, 120)
    run.weights = {"web": "1", "books": "1"}
    assert resumed_clock(run.run, run.prepared.train, manifest) == Clock(1, 30, 120, 30, {"web": 20, "books": 10})


def test_train_py_with_other_sources(crew: Any, tmp_path: Path) -> None:
    """And the weights once more: no source's epochs fall. The tokenizer stays that which was trained on the first."""
    (tmp_path / "more").mkdir()
    paths = [write_text(tmp_path, 60), write_text(tmp_path / "more", 25)]
    arguments = [*SMALL, f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "steps=6", "batch.micro=4"]

    def go(stop: int, *weights: int) -> str:
        sources = [
            f"{{path: {path}, name: {name}, weight: {weight}}}"
            for path, name, weight in zip(paths, ("a", "b"), weights, strict=False)
        ]
        done = trained(crew(1), *arguments, f"data.train=[{', '.join(sources)}]", f"stop_at={stop}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    go(2, 1)
    os.utime(paths[0].rename(tmp_path / "elsewhere.jsonl"))  # the same text
    paths[0] = tmp_path / "elsewhere.jsonl"
    said = go(4, 1, 3)
    assert "sample 8 of the run: a after 8 samples, b from its start" in said
    assert "warning" not in said
    go(6, 1, 3)
    epochs = [row["epochs"] for row in train_rows(tmp_path / "run")]
    assert all(one["a"] <= other["a"] for one, other in pairwise(epochs))
    rate = epochs[1]["a"] / 2
    assert epochs[5]["a"] == pytest.approx(rate * (2 + 4 / 4), rel=1e-6)
    clock = json.loads((tmp_path / "run" / "checkpoints" / "step-6" / "manifest.json").read_text())["clock"]
    assert (clock["mixed"], clock["taken"], clock["orders"]) == (8, {"a": 8, "b": 0}, {"a": ""})
    newest = tmp_path / "run" / "checkpoints" / "step-6"
    assert tokenizer_of(newest) == newest / "tokenizer"
    (newest / "tokenizer" / "tokenizer.json").write_text("{}")  # as the checkpoint, it is set aside: the one before it
    assert tokenizer_of(newest) == newest.parent / "step-4" / "tokenizer"
    assert tokenizer_of(None) is None
