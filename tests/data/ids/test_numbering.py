"""Ids of another numbering of the same tokens are translated exactly, and other tokens are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import id_files
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import DataConfig, Run
from opt_parallel.data.encode import numbering
from opt_parallel.data.encode.tokenizer import encode_documents, save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import prepare
from opt_parallel.data.store import elsewhere
from opt_parallel.data.store.store import TokenStore
from opt_parallel.huggingface.tokenizer import OF_GPT2, byte_level
from opt_parallel.runtime.errors import UserError

TEXTS = [f"document {number} has some words, déjà vu 🙂, and no more" + " again" * (number % 5) for number in range(60)]
OURS = train_tokenizer(TEXTS, 330)
END = 2


def renumbered(tokenizer: Tokenizer, merges: slice = slice(None)) -> Tokenizer:
    """The same merges with other numbers, and GPT-2's only special token as the last id."""
    model = json.loads(tokenizer.to_str())["model"]
    pairs = [tuple(merge) for merge in model["merges"][merges]]
    words = [word for word in model["vocab"] if len(word) == 1] + ["".join(pair) for pair in pairs]
    random.Random(0).shuffle(words)
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), OF_GPT2])}
    return byte_level(models.BPE(vocabulary, pairs), [OF_GPT2], None)


THEIRS = renumbered(OURS)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tokenizer(OURS, tmp_path / "ours")
    write(THEIRS, tmp_path / "theirs")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def write(tokenizer: Tokenizer, folder: Path) -> str:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return str(folder)


def tokens_of(place: Path, name: str, **data: Any) -> list[int]:
    data = {"tokenizer": str(place / "ours"), "sequence_length": 16, "workers": 1, **data}
    run = Run(
        model=ModelConfig(vocab_size=330, max_position_embeddings=128),
        data=DataConfig(train=str(place / name), cache=str(place / "cache"), **data),
    )
    store = TokenStore(prepare(run).train[0].store, 330)
    return store.of_tokens("ids", 0, store.tokens).tolist()


def test_the_tokens_are_those_of_the_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, end = encode_documents(THEIRS, TEXTS), THEIRS.token_to_id(OF_GPT2)
    assert given != encode_documents(OURS, TEXTS)
    id_files.flat(place / "nano.bin", given, end)
    id_files.llm_c(place / "gpt2.bin", given, end)
    id_files.megatron(place / "megatron.bin", given)
    (place / "ids.jsonl").write_text("".join(json.dumps({"input_ids": [*ids, end]}) + "\n" for ids in given))
    wanted = tokens_of(place, "text.jsonl", ids_of=str(place / "theirs"))
    capsys.readouterr()
    for name in ("nano.bin", "gpt2.bin", "megatron.idx", "ids.jsonl"):
        field = "input_ids" if name == "ids.jsonl" else "text"
        assert tokens_of(place, name, ids_of=str(place / "theirs"), text_field=field) == wanted
        said = capsys.readouterr().out
        assert "theirs are translated to those of data.tokenizer; of " in said
        assert "both tokenizers decode the same text and encode it to the same tokens" in said
    assert tokens_of(place, "nano.bin", ids_of=str(place / "theirs"), deduplicate=True)  # the selection decodes


def test_a_damaged_table_is_named(place: Path) -> None:
    id_files.flat(place / "nano.bin", encode_documents(THEIRS, TEXTS), THEIRS.token_to_id(OF_GPT2))
    tokens_of(place, "nano.bin", ids_of=str(place / "theirs"))
    (table,) = (place / "cache").rglob("table-*.npy")
    content = bytearray(table.read_bytes())
    content[-4] ^= 1
    table.write_bytes(content)
    elsewhere._table.cache_clear()
    with pytest.raises(UserError, match=r"table-.* cannot be read .it differs from its checksum.: remove"):
        tokens_of(place, "nano.bin", ids_of=str(place / "theirs"))


def refused(place: Path, name: str, message: str, ids: list[list[int]] | None = None) -> None:
    id_files.flat(place / "ids.bin", ids or [[5, 6]], THEIRS.token_to_id(OF_GPT2))
    with pytest.raises(UserError, match=message) as failure:
        tokens_of(place, "ids.bin", ids_of=str(place / name))
    assert "\n" not in str(failure.value)


def test_other_tokens_are_refused(place: Path) -> None:
    write(renumbered(train_tokenizer(["quite different words of another text"] * 9, 330)), place / "other")
    refused(place, "other", "has other merges than data.tokenizer: merge 1 is '.*' and '.*write the corpus with")
    write(renumbered(OURS, slice(-3)), place / "fewer")
    refused(place, "fewer", "has [0-9]+ merges and data.tokenizer [0-9]+, so its ids mean other texts")
    changed = Tokenizer.from_str(THEIRS.to_str())
    changed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    write(changed, place / "splits")
    refused(place, "splits", "splits text otherwise than data.tokenizer .pre_tokenizer: .*add_prefix_space")
    words = Tokenizer(models.WordLevel({"a": 0, OF_GPT2: 1}, unk_token="a"))
    write(words, place / "words")
    refused(place, "words", "is a WordLevel and data.tokenizer a BPE, but only the ids of byte-pair encodings")
    refused(place, "absent", "^data.ids_of=.*absent does not exist: name a folder with tokenizer.json$")


def test_a_token_without_a_partner(place: Path) -> None:
    more = Tokenizer.from_str(THEIRS.to_str())
    more.add_special_tokens([AddedToken("<|chat|>", special=True)])
    write(more, place / "more")
    number = more.token_to_id("<|chat|>")
    refused(place, "more", f"has the id {number}, a token of data.ids_of without a partner", [[5, 6], [number, 7]])
    plain = Tokenizer.from_str(THEIRS.to_str())
    plain.add_tokens([AddedToken("zebra crossing")])
    write(plain, place / "plain")
    refused(place, "plain", "has the token 'zebra crossing' = [0-9]+, which data.tokenizer lacks")


def test_the_proof_sees_a_wrong_table() -> None:
    from opt_parallel.data.encode.tokenizer import of_opt
    from opt_parallel.huggingface.tokenizer import LoadedTokenizer

    found = numbering.numbering_of("theirs", LoadedTokenizer(THEIRS), of_opt(OURS), END)
    ids = [np.array(each) for each in encode_documents(THEIRS, TEXTS[:5])]
    assert numbering.prove(found, OURS, ids, "data.train") == 5
    assert found.table[found.end] == END
    found.table[ids[3][2]] += 1
    with pytest.raises(UserError, match=r"read the tokens of '.*' differently"):
        numbering.prove(found, OURS, ids, "data.train")
