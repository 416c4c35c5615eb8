"""A store that is not as it was written is named, before anything of it is trained on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT, python, small
from stores import store_of
from training import trained

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.config.task import Task, TaskConfig
from opt_parallel.data.encode.columns import LENGTHS, Column, Encoded, columns_of, ids_column
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.data.samples.samples import Labelled, Samples
from opt_parallel.data.store import blocks
from opt_parallel.data.store import store as store_module
from opt_parallel.data.store import verify as verifying
from opt_parallel.data.store.build import Recipe, fill
from opt_parallel.data.store.statistics import line_of, table_of
from opt_parallel.data.store.store import Damaged, PartWriter, TokenStore, write_manifest
from opt_parallel.data.store.stream import Filling, GrowingStore, complete_parts
from opt_parallel.data.tasks import open_samples
from opt_parallel.data.text import files, sources
from opt_parallel.runtime.errors import UserError

TEXTS = [f"document {number} tells of {number * number} and of {number % 7}" for number in range(60)]
TOKENIZER = train_tokenizer(TEXTS, 290)
RECORDS: dict[Task, Callable[[int], dict[str, Any]]] = {
    Task.pretrain: lambda number: {"text": TEXTS[number]},
    Task.finetune: lambda number: {"prompt": TEXTS[number], "completion": f" {number}"},
    Task.classify: lambda number: {"text": TEXTS[number], "label": ["odd", "even"][number % 2]},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Task, tuple[Run, Prepared]]]:
    """A store of several parts, of several blocks each, for every task."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (files, sources):
            patch.setattr(module, "PIECE_BYTES", 900)
        for module in (blocks, store_module, verifying):
            patch.setattr(module, "BLOCK", 64)
        yield {task: _prepared(tmp_path_factory.mktemp(task.value), task) for task in RECORDS}


def _prepared(folder: Path, task: Task) -> tuple[Run, Prepared]:
    rows = [RECORDS[task](number) for number in range(len(TEXTS))]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(TOKENIZER, folder / "tokenizer")
    run = Run(
        model=ModelConfig(vocab_size=290, max_position_embeddings=128),
        task=TaskConfig(name=task),
        data=DataConfig(
            train=str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer"), cache=str(folder / "cache"),
            sequence_length=32, workers=1,
        ),
    )  # fmt: skip
    return run, prepare(run)


def digest_of(samples: Samples) -> str:
    """Of everything that training would be given."""
    digest = hashlib.sha256()
    for number in range(len(samples)):
        sample = samples.sample(number)
        for array in (sample.ids, sample.labels, sample.segments, sample.positions):
            digest.update(repr(None if array is None else (array.shape, array.tolist())).encode())
    return digest.hexdigest()


def trained_on(run: Run, prepared: Prepared) -> str:
    return digest_of(open_samples(run, prepared.train[0].store, "data.train", prepared.labels))


def answer_of(read: Callable[[], str]) -> str:
    """What is read, or `named` where a line says what is wrong. Anything else is a traceback."""
    try:
        return read()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert "builds it again" in line
    return "named"


@contextmanager
def flipped(path: Path, dice: random.Random) -> Iterator[None]:
    """A file with one other bit."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(changed)
    yield
    path.write_bytes(data)


@pytest.mark.parametrize("task", RECORDS)
def test_flipped_bits(prepared: Any, task: Task, request: pytest.FixtureRequest) -> None:
    """Of sixty in each store (a thousand with --long), and half as many in store.json: all are named when the store
    is verified. Training names them, or is given what it would have been."""
    run, made = prepared[task]
    folder, dice = made.train[0].store, random.Random(task.value)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len([path for path in paths if path.name == "part.json"]) > 2
    right, tally = trained_on(run, made), Counter[str]()
    number = 1000 if request.config.getoption("long") else 60
    for path in [*dice.choices(paths, k=number), *[folder / "store.json"] * (number // 2)]:
        with flipped(path, dice):
            trained = answer_of(lambda: trained_on(run, made))
            assert trained in (right, "named"), path
            assert path.suffix != ".bin" or trained == "named" or path.stem == "lengths"
            assert answer_of(lambda: verifying.verify("data.train", TokenStore(folder, 290))) == "named", path
            tally[trained] += 1
    assert tally["named"] > number  # the others were where nobody looks but `verify`: words.npy, lengths of a text
    assert answer_of(lambda: verifying.verify("data.train", TokenStore(folder))).startswith("data.train: ")


@pytest.mark.parametrize("kind", ["tokenizer", "labels"])
def test_flipped_bits_of_what_else_is_prepared(prepared: Any, kind: str) -> None:
    run, made = prepared[Task.classify]
    (folder,) = [path for path in Path(run.data.cache).glob(f"{kind}-*") if path.is_dir()]
    paths, dice = [*folder.iterdir(), Path(f"{folder}.checksums")], random.Random(kind)
    for path in dice.choices(paths, k=30):
        with flipped(path, dice):
            assert answer_of(lambda: str(prepare(run).train[0].store)) == "named", path
    assert prepare(run) == made
    Path(f"{folder}.checksums").unlink()  # as earlier versions left it
    assert prepare(run) == made


def test_a_stream_that_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flipped bits of its parts are named, and the filler makes anew what a damaged one began."""
    monkeypatch.setattr("opt_parallel.data.encode.pretrain.BATCH_CHARACTERS", 300)
    monkeypatch.setattr("opt_parallel.data.store.stream.LOST", 0.0)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = Recipe(sources.Corpus.find("data.train", [str(path)]), TextEncoder(TOKENIZER, 2))
    filling = Filling(tmp_path / "stream", recipe, 500, 1, part_tokens=1)
    filling.complete()
    paths, dice = sorted(filling.folder.glob("part-*/*")), random.Random(0)
    assert len(paths) > 12
    assert not (filling.folder / "store.json").exists()

    def read() -> str:
        store = GrowingStore(filling.folder, recipe.encoder.columns, 8, 290)
        store.arrived(500 // 8 - 2)
        return store.of_tokens("ids", 0, store.tokens).tobytes().hex()

    right = read()
    for path in dice.choices([path for path in paths if path.name in ("ids.bin", "part.json")], k=50):
        with flipped(path, dice):
            answer = answer_of(read)
            assert answer in ("named", right)
            assert path.name == "part.json" or answer == "named"
    names = [part.name for part in sorted(filling.folder.glob("part-*"))]
    (filling.folder / names[1] / "part.json").write_text("{}")
    assert len(complete_parts(filling.folder)) == 1
    filling.complete()
    assert read() == right


def test_a_preparation_that_goes_on_makes_damaged_parts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, sources):
        monkeypatch.setattr(module, "PIECE_BYTES", 300)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = Recipe(sources.Corpus.find("data.train", [str(path)]), TextEncoder(TOKENIZER, 2))
    metas = fill(tmp_path, [recipe], 1)
    whole = {each: each.read_bytes() for each in tmp_path.glob("part-*/*")}
    for number, content in enumerate((b"", b"[]", b"{}", b'{"part": 3, "lengths": 4}', b"\x00")):
        (tmp_path / f"part-{number:05d}" / "part.json").write_bytes(content)
    assert fill(tmp_path, [recipe], 1) == metas
    assert {each: each.read_bytes() for each in tmp_path.glob("part-*/*")} == whole


GOOD = {
    "format": 1, "counts": {},
    "columns": {"ids": {"dtype": "uint16", "per_token": True, "width": 1},
                "lengths": {"dtype": "uint32", "per_token": False, "width": 1}},
    "parts": [{"name": "part-00000", "documents": 60, "tokens": 1020}],
    "statistics": {"text_bytes": 3704, "lengths": {"min": 17.0}, "unigram_entropy": 3.5},
}  # fmt: skip
WRONG: list[Any] = [
    None, [], 3, "x", {}, {**GOOD, "format": 3}, {**GOOD, "more": 2},
    {**GOOD, "columns": []}, {**GOOD, "columns": {}}, {**GOOD, "columns": {"ids": GOOD["columns"]["ids"]}},
    *({**GOOD, "columns": {**GOOD["columns"], "ids": {"dtype": "uint16", "per_token": True, "width": 1} | wrong}}
      for wrong in ({"dtype": "object"}, {"dtype": 3}, {"width": 0}, {"width": -1}, {"per_token": 1}, {"dtype": "U9"})),
    *({**GOOD, "parts": [GOOD["parts"][0] | wrong]}
      for wrong in ({"name": "../store"}, {"name": "/dev/zero"}, {"name": 3}, {"tokens": -1}, {"tokens": 1021},
                    {"tokens": 10**30}, {"documents": 59}, {"documents": None}, {"checksum": "00000000"})),
    {**GOOD, "parts": {}}, {**GOOD, "parts": [3]}, {**GOOD, "counts": []}, {**GOOD, "counts": {"a": "b"}},
    *({**GOOD, "statistics": wrong} for wrong in (3, {}, {"text_bytes": "3", "lengths": {}, "unigram_entropy": 1.0},
                                                  {"text_bytes": 3, "lengths": [], "unigram_entropy": 1.0})),
    {**GOOD, "checksum": "00000000"},
]  # fmt: skip


@pytest.mark.parametrize("content", [*(json.dumps(each).encode() for each in WRONG), b"", b"\xff\xfe{", b"[" * 10**6])
def test_a_store_json_of_any_content(content: bytes, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "tests" / "saved_before" / "store", tmp_path / "store")
    (folder / "store.json").write_text(json.dumps(GOOD))
    assert TokenStore(folder).of_tokens("ids", 0, 3).shape == (3,)
    (folder / "store.json").write_bytes(content)

    def read() -> str:
        store = TokenStore(folder)
        line_of("data.train", store)
        table_of(store)
        return "read"

    assert answer_of(read) == "named"
    (folder / "store.json").unlink()
    (folder / "store.json").mkdir()
    assert answer_of(read) == "named"


def test_a_store_of_an_earlier_version_is_read_without_checksums(tmp_path: Path) -> None:
    """Its flipped bits are named or go by unseen, and never end in a traceback."""
    folder = shutil.copytree(ROOT / "tests" / "saved_before" / "store", tmp_path / "store")
    store = TokenStore(folder, 512)
    assert (store.tokens, store.documents, int(store.ends[-1])) == (1020, 60, 1020)
    assert "1 parts of 0.0 MB" in (said := verifying.verify("data.train", store))
    assert "of 1 parts without checksums, only the sizes were compared" in said
    paths, dice = [path for path in sorted(folder.rglob("*")) if path.is_file()], random.Random(1)

    def read() -> str:
        store = TokenStore(folder, 512)
        line_of("data.train", store)
        table_of(store)
        return f"{store.of_tokens('ids', 0, store.tokens).sum()} {store.ends[-1]}"

    tally = Counter[str]()
    for path in dice.choices(paths, k=200):
        with flipped(path, dice):
            tally["named" if answer_of(read) == "named" else "read"] += 1
    assert tally["named"] > 20


@pytest.mark.parametrize("part", [0, 1])
def test_a_token_that_is_no_word_of_the_network(tmp_path: Path, part: int) -> None:
    """In a store that is as it was written: it is of another tokenizer, or was put together by hand."""
    parts = [[[1, 2, 3]], [[4, 5]]]
    parts[part][0][-1] = 290
    store_of(tmp_path, parts)
    store = TokenStore(tmp_path, 290)
    with pytest.raises(Damaged, match=rf"part-0000{part} has the token 290, outside model.vocab_size=290"):
        store.of_tokens("ids", 0, 5)
    with pytest.raises(Damaged, match=rf"part-0000{part} has the token 290, outside model.vocab_size=290"):
        verifying.verify("data.train", store)
    assert TokenStore(tmp_path, 291).of_tokens("ids", 0, 5).max() == 290


@pytest.mark.parametrize(("label", "labels"), [(3, 3), (-1, 3), (np.nan, None), (np.inf, 2)])
def test_a_label_that_is_none(tmp_path: Path, label: float, labels: int | None) -> None:
    column = Column("int32") if label in (3, -1) else Column("float32", width=2)
    columns = {"ids": ids_column(100), "lengths": LENGTHS, "label": column}
    writer = PartWriter(tmp_path / "part-00000", columns)
    values = np.array([2, label]) if column.width == 1 else np.array([[1.0, 0.0], [0.0, label]])
    writer.write(Encoded({**columns_of([[1, 2], [3]]), "label": values}))
    write_manifest(tmp_path, columns, [writer.close()], {})
    samples = Labelled(TokenStore(tmp_path), labels)
    samples.sample(0)
    with pytest.raises(Damaged, match="example 1 has the label"):
        samples.sample(1)


def test_the_commands(crew: Any, tmp_path: Path) -> None:
    """A changed id ends a run with a line that says what to do, and verify=true names the part."""
    arguments = small(tmp_path)
    whole = python("scripts/prepare.py", *arguments, "verify=true")
    assert whole.returncode == 0, whole.stderr
    assert "are undamaged" in whole.stdout
    (ids,) = (tmp_path / "cache").glob("store-*/part-00000/ids.bin")
    data = bytearray(ids.read_bytes())
    data[len(data) // 2] ^= 1
    ids.write_bytes(data)
    for refused in (trained(crew(1), *arguments), python("scripts/prepare.py", *arguments, "verify=true")):
        (line,) = [line for line in refused.stderr.splitlines() if line]
        assert refused.returncode == 2
        assert "part-00000/ids.bin differs from its checksum" in line
        assert "remove it, and the next start builds it again" in line
    shutil.rmtree(ids.parent.parent)
    again = python("scripts/prepare.py", *arguments, "verify=true")
    assert again.returncode == 0, again.stderr
    assert "are undamaged" in again.stdout
