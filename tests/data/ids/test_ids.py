"""Files of token ids give the samples of the text that they were made of, whatever program wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import id_files
import numpy as np
import pytest

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import EvaluationConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.data import tasks
from opt_parallel.data.encode.tokenizer import encode_documents, save_tokenizer, train_tokenizer
from opt_parallel.data.ids import documents, formats
from opt_parallel.data.prepare import Prepared, prepare
from opt_parallel.data.store import verify as verifying
from opt_parallel.data.store.statistics import table_of
from opt_parallel.data.store.store import TokenStore
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError

TEXTS = [f"document {number} has some words, and no more" + " again" * (number % 9) for number in range(120)]
TEXTS += TEXTS[:7]  # duplicates
TOKENIZER = train_tokenizer(TEXTS, 300)
DOCUMENTS = encode_documents(TOKENIZER, TEXTS)
END = 2
# a file of each format, by name, and the settings that read it
WRITERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "megatron.idx": (lambda path: id_files.megatron(path.with_suffix(".bin"), DOCUMENTS), {}),
    "ended.bin": (lambda path: id_files.megatron(path, DOCUMENTS, "int32", END, cut=5), {}),
    "wide.idx": (lambda path: id_files.megatron(path.with_suffix(".bin"), DOCUMENTS, "int64"), {}),
    "nano.bin": (lambda path: id_files.flat(path, DOCUMENTS, END), {}),
    "gpt2.bin": (lambda path: id_files.llm_c(path, DOCUMENTS, END), {}),
    "llama3.bin": (lambda path: id_files.llm_c(path, DOCUMENTS, END, "uint32"), {}),
    "array.npy": (lambda path: id_files.numpy(path, DOCUMENTS, END, "int64"), {}),
    "olmo.npy": (lambda path: id_files.flat(path, DOCUMENTS, END, "uint32"), {"dtype": "uint32"}),
    "plain.ds": (lambda path: id_files.datatrove(path, DOCUMENTS), {}),
    "ended.ds": (lambda path: id_files.datatrove(path, DOCUMENTS, END, "uint32"), {}),
    "ids.jsonl": (
        lambda path: path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in DOCUMENTS)),
        {"text_field": "input_ids"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as text and in each format, and their tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, (write, _) in WRITERS.items():
        write(folder / name)
    save_tokenizer(TOKENIZER, folder / "tokenizer")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and chunks of some documents, and files that are too large to be read when they are prepared."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 1200)
    monkeypatch.setattr(documents, "CHUNK", 64)
    monkeypatch.setattr(documents, "COMPLETE", 100)
    monkeypatch.setattr(documents, "PLACES", 10)
    monkeypatch.setattr(documents, "PLACE", 16)


def run_of(path: Path, cache: Path, every: int = 0, **data: Any) -> Run:
    corpus = path.parent if path.parent.name.startswith("corpus") else path.parent.parent
    settings = {"train": str(path), "tokenizer": str(corpus / "tokenizer"), "sequence_length": 16, **data}
    return Run(
        model=ModelConfig(vocab_size=300, max_position_embeddings=128),
        data=DataConfig(cache=str(cache), workers=1, **settings),
        evaluation=EvaluationConfig(every=every),
    )


def tokens_of(prepared: Prepared) -> list[list[int]]:
    stores = [each.store for each in prepared.train] + ([prepared.validation] if prepared.validation else [])
    opened = [TokenStore(each, 300) for each in stores]
    return [store.of_tokens("ids", 0, store.tokens).tolist() for store in opened]


SETTINGS = [{}, {"every": 5, "held_out": 0.2}, {"deduplicate": True}]


@pytest.fixture(scope="module")
def wanted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """The tokens of the text with each of the settings."""
    cache = tmp_path_factory.mktemp("cache")
    return [tokens_of(prepare(run_of(folder / "text.jsonl", cache, **each))) for each in SETTINGS]


@pytest.mark.parametrize("name", WRITERS)
def test_the_tokens_are_those_of_the_text(
    name: str, folder: Path, wanted: list[list[list[int]]], tmp_path: Path
) -> None:
    for settings, tokens in zip(SETTINGS, wanted, strict=True):
        assert tokens_of(prepare(run_of(folder / name, tmp_path, **settings, **WRITERS[name][1]))) == tokens


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["megatron.idx", "ended.bin", "nano.bin", "gpt2.bin", "ended.ds"])
def test_large_files_in_pieces(name: str, folder: Path, wanted: list[list[list[int]]], tmp_path: Path) -> None:
    for settings, tokens in zip(SETTINGS, wanted, strict=True):
        prepared = prepare(run_of(folder / name, tmp_path, **settings))
        assert tokens_of(prepared) == tokens
        store = TokenStore(prepared.train[0].store)
        assert len(store.parts) > 2
        for start in range(0, len(tokens[0]) - 40, 97):
            assert store.of_tokens("ids", start, start + 40).tolist() == tokens[0][start : start + 40]
        assert "are undamaged" in verifying.verify("data.train", store)


@pytest.mark.parametrize("name", ["megatron.idx", "nano.bin", "ids.jsonl"])
def test_a_stream(name: str, folder: Path, wanted: list[list[list[int]]], tmp_path: Path) -> None:
    run = run_of(folder / name, tmp_path, stream=True, **WRITERS[name][1])
    prepared = prepare(run)
    (filling,) = tasks._mixture(run, prepared, Clock())[1]
    filling.complete()
    store = TokenStore(filling.folder)
    assert [store.of_tokens("ids", 0, store.tokens).tolist()] == wanted[0]


def test_no_ids_are_copied(folder: Path, tmp_path: Path) -> None:
    store = prepare(run_of(folder / "wide.idx", tmp_path)).train[0].store
    files = {path.name for path in store.rglob("*") if path.is_file()}
    assert files == {"store.json", "part.json", "words.npy", "starts.bin", "lengths.bin", "ended.bin"}
    assert sum(path.stat().st_size for path in store.rglob("*.bin")) == 13 * len(DOCUMENTS)


def test_statistics(folder: Path, tmp_path: Path) -> None:
    def table(name: str) -> dict[str, str]:
        rows = table_of(TokenStore(prepare(run_of(folder / name, tmp_path)).train[0].store))
        return {row[0]: row[1] for row in rows}

    assert table("megatron.idx") == table("text.jsonl")
    assert table("gpt2.bin")["unigram entropy"] == table("text.jsonl")["unigram entropy"]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(lambda ids: [END, *ids], id="at the start"),
        pytest.param(lambda ids: [END, *ids, END], id="around"),
        pytest.param(lambda ids: [END, END, *ids, END, END], id="doubled"),
        pytest.param(lambda ids: ids if ids[0] % 2 else [*ids, END], id="of some"),
    ],
)
def test_ends_are_not_doubled(
    large: bool, ends: Callable[[list[int]], list[int]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if large and "doubled" not in request.node.name:  # one end is expected where only some documents are looked at
        request.getfixturevalue("small")
    given = [[5, 6, 7], [8, 9], [11], [12, END, 13]] * 9  # an end inside a document stays
    save_tokenizer(TOKENIZER, tmp_path / "corpus" / "tokenizer")
    path = tmp_path / "corpus" / "ids.bin"
    id_files.megatron(path, [ends(ids) for ids in [*given, []] if ids] + [[]])
    (found,) = tokens_of(prepare(run_of(path, tmp_path / "cache")))
    assert found == [token for ids in given for token in [*ids, END]]


def test_a_file_that_was_moved_is_the_same_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for path in (*folder.glob("megatron.*"), folder / "tokenizer"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "corpus" / path.name)
    before, after = (prepare(run_of(place / "megatron.bin", tmp_path)) for place in (folder, tmp_path / "corpus"))
    assert before.text == after.text
    assert before.train[0].store != after.train[0].store
    shutil.rmtree(tmp_path / "corpus")
    assert tokens_of(before)
    with pytest.raises(UserError, match=r"megatron.bin cannot be read \(No such file.*restore"):
        tokens_of(after)


def test_an_index_in_upper_case_and_a_name_without_ending(place: Path, wanted: list[list[list[int]]]) -> None:
    fails(place / "megatron", "no such file or folder, but megatron.idx exists: set data.train=.*megatron.idx")
    for ending in ("bin", "idx"):
        (place / f"megatron.{ending}").rename(place / f"MEGATRON.{ending.upper()}")
    for name in ("MEGATRON.BIN", "MEGATRON.IDX"):
        assert tokens_of(prepare(run_of(place / name, place / "cache"))) == wanted[0]


def test_a_folder_is_read_as_ids_only_without_text(folder: Path, tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "corpus" / "shards"
    place.mkdir(parents=True)
    for number in range(3):
        id_files.megatron(place / f"{number}.bin", DOCUMENTS[number::3])
    for entry in (place, place / "*.bin"):
        run = run_of(place, tmp_path / "cache", train=str(entry), tokenizer=str(folder / "tokenizer"))
        assert len(tokens_of(prepare(run))[0]) == sum(len(ids) + 1 for ids in DOCUMENTS)
    assert "; 3 files of ids read in place" in capsys.readouterr().out
    (place / "text.txt").write_text("some words and no more")
    prepare(run_of(place, tmp_path / "cache", train=str(place), tokenizer=str(folder / "tokenizer"), sequence_length=2))
    assert "some files were found but not read: 3 .bin, 3 .idx" in capsys.readouterr().out


def test_a_mixture_of_text_and_ids(folder: Path, tmp_path: Path) -> None:
    """The order of the mixture depends on names, weights and numbers of tokens, which are equal."""

    def samples(first: str, second: str) -> list[list[int]]:
        train = [{"path": str(folder / first), "name": "a", "weight": 2}, {"path": str(folder / second), "name": "b"}]
        run = run_of(folder / first, tmp_path, train=train)
        mixture = tasks.open_mixture(run, prepare(run), Clock())
        return [mixture.sample(number).ids.tolist() for number in range(300)]

    assert samples("text.jsonl", "text.jsonl") == samples("megatron.idx", "nano.bin") == samples("gpt2.bin", "plain.ds")


def fails(path: Path, message: str, **data: Any) -> None:
    with pytest.raises(UserError, match=message) as failure:
        prepare(run_of(path, path.parent / "cache", **data))
    assert "\n" not in str(failure.value)


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "corpus")
    return tmp_path / "corpus"


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, place: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(new)] = new
    path.write_bytes(content)


def test_what_is_wrong_with_a_pair_is_named(place: Path) -> None:
    path, index = place / "megatron.bin", place / "megatron.idx"
    good, entries = index.read_bytes(), 34 + 12 * len(DOCUMENTS)
    path.write_bytes(path.read_bytes() + b"\0\0")
    fails(path, r"megatron.idx describes [\d,]+ bytes of uint16, but megatron.bin has [\d,]+: copy both")
    cut(path, -2)
    for size in (20, 1000, len(good) - 8):
        cut(index, size)
        fails(path, "megatron.idx (has [0-9,]+ bytes instead of [0-9,]+|is no index of Megatron-LM)")
        index.write_bytes(good)
    wrong = [
        (0, b"TNTIDX\0\0", "is no index of Megatron-LM, because it does not start with MMIDIDX"),
        (9, b"\2", "has version 2, but version 1 is read"),
        (17, b"\6", r"names the type 6, which is no integer type \(1, 2, 3, 4, 5, 8 are\)"),
        (38, b"\1", "the positions of the sequences in megatron.idx contradict their lengths"),
        (entries - 16, b"\xff\xff\xff", "(contradict their lengths|describes [0-9,]+ bytes)"),
        (entries + 8, b"\xff\xff", "names sequences that do not exist"),
    ]
    for position, new, message in wrong:
        overwrite(index, position, new)
        fails(path, message)
        index.write_bytes(good)
    index.unlink()
    (place / "alone.idx").write_bytes(good)
    fails(place / "alone.idx", "is an index, and its ids are missing: copy alone.bin beside it")


def test_what_is_wrong_with_a_file_is_named(place: Path) -> None:
    (place / "empty.bin").touch()
    fails(place / "empty.bin", "is empty: name a file with token ids")
    cut(place / "nano.bin", 101)
    fails(place / "nano.bin", "has 101 bytes, which is no multiple of the 2 bytes of uint16")
    cut(place / "gpt2.bin", -2)
    fails(place / "gpt2.bin", r"bytes instead of the [\d,]+ of its header .*: copy the file again, or set data.dtype=")
    overwrite(place / "llama3.bin", 4, b"\1")
    fails(place / "llama3.bin", r"header of llm.c \(magic number 20240801\) of version 1, but version 7 is read")
    cut(place / "array.npy", -8)
    fails(place / "array.npy", "bytes instead of the [0-9,]+ of its header: copy the file again")
    np.save(place / "float.npy", np.ones(9, np.float32))
    fails(place / "float.npy", "is an array of float32: write ids as integers")
    np.save(place / "big.npy", np.ones(9, ">u2"))
    fails(place / "big.npy", "is an array of >u2: write ids as integers in C order")
    np.save(place / "columns.npy", np.asfortranarray(np.ones((3, 3), "<u2")))
    fails(place / "columns.npy", "is an array of uint16 in Fortran order: write ids")
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (-5, -4)}"
    (place / "shape.npy").write_bytes(b"\x93NUMPY\1\0" + bytes([len(header), 0]) + header + bytes(40))
    fails(place / "shape.npy", r"has a damaged header .its shape is \(-5, -4\).: write it with np.save")
    (place / "plain.ds.index").unlink()
    fails(place / "plain.ds", "needs its index: copy plain.ds.index beside it")
    cut(place / "ended.ds", -4)
    fails(place / "ended.ds", r"counts [\d,]+ ids, which are [\d,]+ or [\d,]+ bytes, but ended.ds has [\d,]+: copy")
    (place / "model.bin").write_bytes(b"PK\x03\x04" * 9)
    fails(place / "model.bin", "is a zip archive, such as PyTorch's, and not ids")
    (place / "packed.npy.gz").write_bytes(b"1")
    fails(place / "packed.npy.gz", "is packed, but ids are read in place: unpack it")


def test_a_file_that_could_be_two_formats(place: Path) -> None:
    id_files.llm_c(place / "megatron.bin", DOCUMENTS, END)
    message = "an index of Megatron, megatron.idx, and a header of llm.c: move megatron.idx away.*set data.dtype=uint16"
    fails(place / "megatron.bin", message)
    message = "read as uint16, every id is followed by 1 zeros.*: set data.dtype=uint32, or data.dtype=uint16 if"
    fails(place / "olmo.npy", message)


def test_ids_outside_the_vocabulary(place: Path, tmp_path: Path) -> None:
    id_files.flat(place / "nano.bin", [[5, 6, 300]], END)
    fails(place / "nano.bin", "nano.bin has the id 300, outside the 300 ids of its tokenizer: .*ids_of.*data.dtype")
    id_files.megatron(place / "megatron.bin", [[5, -6]], "int16")
    fails(place / "megatron.bin", "megatron.bin has the id -6, outside the 300 ids")
    fails(place / "array.npy", "has the id [0-9]+, outside the 260 ids", tokenizer=str(small_one(place)))
    fails(place / "gpt2.bin", "has the id [0-9]+, outside", dtype="uint16")  # its header read as ids
    (place / "ids.jsonl").write_text('{"input_ids": [5, 6]}\n{"input_ids": [7, 300]}\n')
    fails(place / "ids.jsonl", "line 2 has the id 300, outside .*; 1 of 2 records is bad", text_field="input_ids")
    (place / "null.jsonl").write_text('{"input_ids": [5, 6]}\n{"input_ids": null}\n')
    fails(place / "null.jsonl", "line 2: 'input_ids' is None, not a string: write its token", text_field="input_ids")
    fails(place / "ids.jsonl", r"has no field 'text', only \['input_ids'\]: set data.text_field=input_ids")


def small_one(place: Path) -> Path:
    """A tokenizer of fewer tokens, whose folder it returns."""
    save_tokenizer(train_tokenizer(["a"], 262), place / "small")
    return place / "small"


@pytest.mark.usefixtures("small")
def test_an_id_outside_the_vocabulary_in_a_large_file_is_an_error_when_it_is_read(place: Path) -> None:
    ids = np.fromfile(place / "nano.bin", "<u2")
    ids[50] = 999
    ids.tofile(place / "nano.bin")
    store = TokenStore(prepare(run_of(place / "nano.bin", place / "cache")).train[0].store, 300)
    assert store.of_tokens("ids", 0, 50).tolist() == ids[:50].tolist()
    with pytest.raises(UserError, match=r"nano.bin has the id 999, outside the 300 ids of its tokenizer"):
        store.of_tokens("ids", 40, 60)
    with pytest.raises(UserError, match=r"nano.bin has the id 999"):
        verifying.verify("data.train", store)


def test_a_file_that_changes_during_the_run(place: Path) -> None:
    store = TokenStore(prepare(run_of(place / "nano.bin", place / "cache")).train[0].store)
    cut(place / "nano.bin", 100)
    with pytest.raises(UserError, match=r"nano.bin ends early: restore the file"):
        store.of_tokens("ids", 0, 60)
    with pytest.raises(UserError, match=r"nano.bin has 100 bytes, but had [\d,]+ when it was prepared"):
        TokenStore(store.folder)


def test_ids_need_their_tokenizer(place: Path) -> None:
    fails(place / "nano.bin", "data.tokenizer=null: .*nano.bin has token ids: set data.tokenizer", tokenizer=None)
    fails(place / "ids.jsonl", "is a list, not a string: .*data.tokenizer", tokenizer=None, text_field="input_ids")
    fails(place / "nano.bin", r"has token ids, and data.template='\{text\}' needs text", template="{text}")
    with pytest.raises(UserError, match=r"data.dtype=float32 must be one of uint8"):
        run_of(place / "nano.bin", place, dtype="float32")


def test_every_byte_of_an_index_may_be_wrong(place: Path) -> None:
    """A changed index is an error in one line, or describes other documents of the same file."""
    path, index = place / "megatron.bin", place / "megatron.idx"
    id_files.megatron(path, DOCUMENTS[:4])
    good = index.read_bytes()
    for position in range(len(good)):
        overwrite(index, position, bytes([good[position] ^ 0x41]))
        try:
            file = formats.open_ids(path, "data.train")
            starts, stops = file.bounds(0, file.documents or 0)
            found = [int(starts[0]), int(stops[-1])] == [0, file.tokens]
        except UserError as error:
            found = "\n" not in str(error)
        assert found, position
        index.write_bytes(good)
