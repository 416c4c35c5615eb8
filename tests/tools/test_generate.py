"""scripts/generate.py: what it prints and writes, as it comes and when done, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, launch, python, write_text
from tampering import edit

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.data import SpecialTokens
from opt_parallel.data.encode.tokenizer import decode_continuation, save_tokenizer, train_tokenizer
from opt_parallel.model.decoding import Decoding
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.terminal import plain

SAMPLED = ["--temperature", "1", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "12"]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("generate_script", ROOT / "opt_parallel" / "commands" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of bytes, so that its texts are full of cut characters."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    lines = write_text(folder).read_text().splitlines()
    save_tokenizer(train_tokenizer([json.loads(line)["text"] for line in lines], 300), folder)
    torch.manual_seed(1)
    config = OPTConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, init_std=0.5,
        max_position_embeddings=40, word_embed_proj_dim=32,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    load_script().main()


def test_a_single_prompt_appears_as_it_is_made(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    from opt_parallel.data.encode.tokenizer import encode_prompt

    class Terminal(io.StringIO):
        pieces: list[str] = []  # noqa: RUF012

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return super().write(text)

    opened = open_checkpoint(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = encode_prompt(tokenizer, "Sentence ü", opened.config)
    seen_whole = 0
    for seed in range(8):
        decoding = Decoding(max_new_tokens=20, temperature=1.0, seed=seed)
        terminal = Terminal()
        Terminal.pieces = []
        monkeypatch.setattr(sys, "stdout", terminal)
        model = opened.model(ALONE, torch.device("cpu"))
        load_script().stream(model, tokenizer, prompt, decoding)
        monkeypatch.undo()
        (text,) = load_script().write(model, tokenizer, [prompt], decoding, batch=1)
        assert terminal.getvalue() == "Sentence ü" + text + "\n"
        assert len([piece for piece in Terminal.pieces if piece.strip()]) > 4  # not all at the end
        seen_whole += "\ufffd" not in text[:-1]
    assert seen_whole < 8  # some text did have cut characters


def test_a_special_token_that_a_prompt_spells(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, where nobody says otherwise; of our checkpoints as the training text was read."""
    texts = []
    for option in ([], ["--special-tokens", "text"], ["--special-tokens", "tokens"]):
        run_script(monkeypatch, "--checkpoint", str(checkpoint), "--prompt", "x</s>7", *SAMPLED, *option)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("x</s>7")
    assert texts[2].startswith("x7")  # what is special is not printed
    saved = shutil.copytree(ROOT / "tests" / "saved_before" / "checkpoint", tmp_path / "saved")
    assert open_checkpoint(saved).special_tokens is SpecialTokens.text  # written before there was a choice
    edit(saved, lambda manifest: manifest["config"]["data"].update(special_tokens="tokens"))
    assert open_checkpoint(saved).special_tokens is SpecialTokens.tokens
    edit(saved, lambda manifest: manifest["config"]["data"].update(special_tokens=["x"]))
    with pytest.raises(UserError, match=r"data.special_tokens="):
        _ = open_checkpoint(saved).special_tokens


def test_a_continuation_keeps_its_first_space() -> None:
    """Also with a tokenizer in sentencepiece's manner, which a text's own first space is dropped by."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1}, unk_token="\u2581one"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert decode_continuation(tokenizer, [0, 1, 1], 1) == " two two"


def test_several_prompts_and_processes(checkpoint: Path, tmp_path: Path) -> None:
    """The same texts from a file of prompts, in batches of two, as from options on two processes."""
    prompts = ["Sentence 7", "The made-up text tells", "x"]
    (tmp_path / "prompts.txt").write_bytes(
        "".join(f"{prompt}\r\n" for prompt in ["\ufeff" + prompts[0], *prompts[1:]]).encode()
    )
    output = tmp_path / "texts.jsonl"
    common = ["scripts/generate.py", "--checkpoint", str(checkpoint), *SAMPLED]
    written = python(*common, "--prompts-file", str(tmp_path / "prompts.txt"), "--output", str(output), "--batch", "2")
    assert written.returncode == 0, written.stderr
    assert written.stdout == ""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    printed = launch(2, *common, *options, "--tensor", "2")
    assert printed.stdout == plain("\n\n".join(row["prompt"] + row["text"] for row in rows) + "\n"), printed.stderr


def test_prompts_of_a_jsonl_and_beams(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two\\nlines"}\n{"prompt": "one\\u2028"}\n')
    run_script(
        monkeypatch, "--checkpoint", str(checkpoint), "--prompts-file", str(tmp_path / "prompts.jsonl"),
        "--beams", "3", "--max-new-tokens", "5",
    )  # fmt: skip
    first, second = capsys.readouterr().out.split("\n\n", maxsplit=1)
    assert first.startswith("two\nlines")
    assert second.startswith("one\u2028")


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "empty file": (["--prompts-file", "empty.txt"], ["empty.txt is empty"]),
    "no file": (["--prompts-file", "none.txt"], ["none.txt", "No such file"]),
    "a pipe": (["--prompts-file", "pipe"], ["pipe is not a regular file"]),
    "a device": (["--prompts-file", "/dev/zero"], ["/dev/zero is not a regular file"]),
    "deep line": (["--prompts-file", "deep.jsonl"], ["deep.jsonl, line 1 is not JSON: maximum recursion"]),
    "blank line": (["--prompts-file", "blank.txt"], ["blank.txt, line 2 is blank"]),
    "broken line": (["--prompts-file", "broken.jsonl"], ["broken.jsonl, line 2", "JSON"]),
    "other keys": (["--prompts-file", "other.jsonl"], ["other.jsonl, line 1", '"prompt"']),
    "long prompt": (["--prompt", "x " * 50, "--prompt", "y"], ["40 positions", "shorten the prompt"]),
    "many tokens": (["--prompt", "x", "--max-new-tokens", "39"], ["max_new_tokens=39", "set max_new_tokens=38"]),
    "zero tokens": (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens=0"]),
    "output exists": (["--prompt", "x", "--output", "empty.txt"], ["--output empty.txt exists"]),
    "output nowhere": (["--prompt", "x", "--output", "no/texts.jsonl"], ["--output no/texts.jsonl"]),
    "processes": (["--prompt", "x", "--tensor", "2"], ["--tensor 2", "torchrun --nproc-per-node 2"]),
    "contradiction": (["--prompt", "x", "--top-k", "5"], ["top_k=5", "temperature=0"]),
    "no text": (["--prompt", os.fsdecode(b"caf\xe9"), "--max-new-tokens", "5"], ["is not valid text", "UTF-8"]),
    "no batch": (["--prompt", "x", "--batch", "0"], ["--batch 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("x\n\ny\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        run_script(monkeypatch, "--checkpoint", str(checkpoint), *arguments)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_heads_that_tensor_does_not_divide(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="num_attention_heads=4 is not divisible by --tensor 3"):
        run_script(monkeypatch, "--checkpoint", str(checkpoint), "--prompt", "x", "--tensor", "3",
                   "--max-new-tokens", "5")  # fmt: skip


def test_a_tokenizer_that_is_not_the_models(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    arguments = ["--checkpoint", str(copy), "--prompt", "x", "--max-new-tokens", "5"]
    save_tokenizer(train_tokenizer([f"Many numbers, such as {i * i}." for i in range(99)], 310), copy)
    with pytest.raises(UserError, match="has 310 tokens, but the model has 300"):
        run_script(monkeypatch, *arguments)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        run_script(monkeypatch, *arguments)


def test_a_mistake_ends_with_one_line_and_status_2(checkpoint: Path) -> None:
    process = python("scripts/generate.py", "--checkpoint", str(checkpoint), "--prompt", "x", "--beams", "0")
    assert process.returncode == 2
    assert process.stderr == "error: beams=0 must be at least 1\n"
