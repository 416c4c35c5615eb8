"""Training from ids repeats training from the text that they were made of, bit for bit."""

from __future__ import annotations

from pathlib import Path

import id_files
import pytest
from command import python, write_text
from id_runs import losses

from opt_parallel.data.encode.tokenizer import encode_documents, load_tokenizer

END = 2


@pytest.mark.long
def test_the_losses_are_those_of_the_text(tmp_path: Path) -> None:
    text = write_text(tmp_path, 200)
    ended = python(
        "scripts/train_tokenizer.py",
        "--input",
        str(text),
        "--vocab-size",
        "300",
        "--output",
        str(tmp_path / "tokenizer"),
    )
    assert ended.returncode == 0, ended.stderr
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    documents = encode_documents(
        tokenizer, [f"Sentence {i} of the made-up text tells that {i} times {i} is {i * i}." for i in range(200)]
    )
    megatron, nano = tmp_path / "megatron.bin", tmp_path / "nano.bin"
    id_files.megatron(megatron, documents, "int32")
    id_files.flat(nano, documents, END)
    id_files.llm_c(tmp_path / "gpt2.bin", documents, END)
    id_files.numpy(tmp_path / "array.npy", documents, END)
    id_files.datatrove(tmp_path / "rows.ds", documents)
    wanted = losses(tmp_path, str(text))
    for name in ("megatron.bin", "nano.bin", "gpt2.bin", "array.npy", "rows.ds"):
        assert losses(tmp_path, str(tmp_path / name)) == wanted
    pairs = [[text, text], [megatron, nano]]
    mixed, of_ids = (f"[{{path: {one}, name: a, weight: 2}}, {{path: {two}, name: b}}]" for one, two in pairs)
    straight = losses(tmp_path, mixed, layouts=(1, 2))
    assert losses(tmp_path, of_ids, layouts=(1, 2)) == straight
    held_out = ("evaluation.every=10", "data.held_out=0.1")
    assert losses(tmp_path, str(nano), *held_out) == losses(tmp_path, str(text), *held_out)
