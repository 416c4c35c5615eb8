"""A tokenizer with more tokens than the checkpoint has rows, and one with special tokens of its own: the embedding
grows, in any layout and from any checkpoint; the tokens keep their ids from the command line to the export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import small, train_rows
from composing import quick_run_of, run_of
from hugging_face import SHAPE, random_model, write_h5, write_msgpack
from layouts import Layout
from lora_runs import random_adapter, run_on, write_base
from metaseq_runs import run_from, train_from
from training import trained

from opt_parallel.checkpoint.grown import EMBEDDING
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.store.store import TokenStore
from opt_parallel.parallel.shard import Constant, Shard
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.evaluate import evaluate

ROWS, MORE = SHAPE["vocab_size"], 167  # of which neither divides by 2
SAVED = Path(__file__).parents[1] / "saved_before" / "checkpoint"
FEW = 270  # tokens of a trained tokenizer


def embedding_of(folder: Path, rows: int, parts: int) -> torch.Tensor:
    """The embedding that grew, put together from what so many tensor ranks read of it."""
    opened = open_checkpoint(folder).grown(rows)
    opened.check_language_model()
    shape = (rows, opened.config.embedding_size)
    shards = [Shard(shape, 0, part, parts, Constant(0.0), False) for part in range(parts)]
    return torch.cat([opened.weights(EMBEDDING, shard).float() for shard in shards])


@pytest.mark.parametrize("kind", ["safetensors", "torch", "h5", "msgpack", "ours", "lora"])
def test_new_rows_are_the_mean_in_any_layout_and_of_any_checkpoint(crew: Any, tmp_path: Path, kind: str) -> None:
    """The others are what they were, to the bit."""
    folder, model = tmp_path / "theirs", random_model()
    folder.mkdir()
    if kind == "safetensors":
        model.save_pretrained(folder, max_shard_size="50KB")
    elif kind == "torch":
        model.config.save_pretrained(folder)
        torch.save(model.half().state_dict(), folder / "pytorch_model.bin")
    elif kind == "h5":
        write_h5(model, folder, "single")
    elif kind == "msgpack":
        write_msgpack(model, folder, "single")
    elif kind == "ours":
        folder = SAVED
    else:
        run = run_on(write_base(folder), tmp_path / "run", Layout())
        crew(1)(random_adapter, run, 0)
        folder = run.folder / "checkpoints" / "step-0"
    rows = open_checkpoint(folder).config.vocab_size
    before, grown = embedding_of(folder, rows, 1), embedding_of(folder, rows + 36, 1)
    assert grown.shape == (rows + 36, before.shape[1])
    assert torch.equal(grown[:rows], before)
    mean = before.double().mean(0).float().expand(36, -1)
    torch.testing.assert_close(grown[rows:], mean, rtol=1e-6, atol=1e-7)  # a sum in another order
    for parts in (2, 3, 8):
        assert torch.equal(embedding_of(folder, rows + 36, parts), grown), parts


def test_that_it_grows_is_said(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_checkpoint(theirs)
    assert opened.grown(FEW) is opened
    opened.grown(MORE + FEW)
    said = capsys.readouterr().out
    assert all(word in said for word in (str(theirs), f"from {FEW} rows", f"model.vocab_size={MORE + FEW}", "mean"))


def test_it_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """Which draws its new rows around the mean, with a deviation of some 3e-5 of the rows' own."""
    model = random_model()
    model.save_pretrained(tmp_path)
    model.resize_token_embeddings(MORE)
    ours = open_checkpoint(tmp_path).grown(MORE).model(ALONE, torch.device("cpu"))
    theirs = model.get_input_embeddings().weight
    assert torch.equal(ours.decoder.embed_tokens.weight[:ROWS], theirs[:ROWS])
    torch.testing.assert_close(ours.decoder.embed_tokens.weight, theirs, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, and in `big` one of its own that has four more."""
    folder = tmp_path_factory.mktemp("checkpoints") / "theirs"
    tokenizer = train_tokenizer(["Sentence of the made-up text"] * 5, FEW)
    random_model({"vocab_size": FEW, "dropout": 0.0}).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    tokenizer.add_special_tokens(["<|end|>", "<|begin|>", "<|pad|>"])
    tokenizer.add_tokens(["<|user|>"])
    save_tokenizer(tokenizer, folder / "big")
    roles = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "unk_token": "<|end|>", "pad_token": "<|pad|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 29, "padding_side": "left", **roles}
    (folder / "big" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "big" / "special_tokens_map.json").unlink()
    return folder


def size_of(folder: Path) -> int:
    from opt_parallel.huggingface.tokenizer import count_tokens, read_tokenizer

    return count_tokens(read_tokenizer(str(folder)).tokenizer)


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        quick_run_of(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_what_may_be_said_of_the_vocabulary(theirs: Path) -> None:
    start, tokens = f"init_from={theirs}", size_of(theirs / "big")
    big = f"data.tokenizer={theirs / 'big'}"
    line = refused(start, big)
    assert f"has {tokens} tokens" in line
    assert f"set model.vocab_size to {tokens}" in line
    line = refused(start, f"model.vocab_size={FEW - 1}")
    assert all(word in line for word in (f"model.vocab_size={FEW - 1}", f"has {FEW} rows", "lost"))
    line = refused(start, "model.vocab_size=400", "task.lora.rank=4")
    assert all(word in line for word in (f"has {FEW} rows", "LoRA cannot train new rows", "task.lora.rank=0"))
    line = refused(start, "model=opt-tiny", "model.hidden_size=48")  # 512 rows that nobody asked for
    assert f"has {FEW}: remove" in line
    assert "model.vocab_size=512 alone" in line
    run = run_of(
        start, "model.vocab_size=400", "data.validation=x", "evaluation.every=0", evaluation=True, tokenizer=True
    )
    with pytest.raises(UserError, match=r"only training adds rows to an embedding"):
        evaluate(run)


def test_ids_are_the_tokenizers_unless_they_are_given(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*arguments: str) -> list[int]:
        model = quick_run_of(f"init_from={theirs}", *arguments).model
        assert model.vocab_size == (tokens if arguments else FEW)
        return [model.bos_token_id, model.eos_token_id, model.pad_token_id]

    tokens = size_of(theirs / "big")
    assert ids() == [2, 2, 1]
    assert capsys.readouterr().out == ""
    brought = [f"data.tokenizer={theirs / 'big'}", f"model.vocab_size={tokens}"]
    end, begin, pad = (tokens - 4, tokens - 3, tokens - 2)
    assert ids(*brought) == [begin, end, pad]
    said = capsys.readouterr().out
    assert all(f"model.{role}_token_id={number}" in said for role, number in (("bos", begin), ("eos", end)))
    assert ids(*brought, "model.pad_token_id=1") == [begin, end, 1]


def test_a_run_from_a_larger_tokenizer_to_its_export(crew: Any, theirs: Path, tmp_path: Path) -> None:
    """Run, checkpoint, export and card know the same tokens; text that spells them is them, where that is asked for;
    the next run starts from either and finds them again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    big, tokens = theirs / "big", size_of(theirs / "big")
    arguments = [argument for argument in small(tmp_path) if not argument.startswith("model=")]
    arguments += [f"init_from={theirs}", f"data.tokenizer={big}"]
    text = tmp_path / "text.jsonl"
    text.write_text(text.read_text().replace("Sentence", "<|user|><|end|>Sentence"))
    arguments += [f"model.vocab_size={tokens + 9}", "data.special_tokens=tokens", "export.at_end=true"]
    process = trained(crew(1), *arguments, "steps=2")
    assert process.returncode == 0, process.stderr
    assert f"grows from {FEW} rows to model.vocab_size={tokens + 9}" in process.stdout
    assert len(train_rows(tmp_path / "run")) == 2
    step, export = tmp_path / "run" / "checkpoints" / "step-2", tmp_path / "run" / "export"

    brought = AutoTokenizer.from_pretrained(big)
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.get_input_embeddings().weight.shape[0] == tokens + 9
    for folder in (step / "tokenizer", export):
        kept = AutoTokenizer.from_pretrained(folder)
        for role in ("bos", "eos", "pad"):
            assert getattr(kept, f"{role}_token") == getattr(brought, f"{role}_token")
            assert getattr(kept, f"{role}_token_id") == getattr(model.config, f"{role}_token_id")
            assert getattr(kept, f"{role}_token_id") == getattr(brought, f"{role}_token_id")
        assert (kept.model_max_length, kept.padding_side) == (29, "left")
        assert kept("<|user|> x<|end|>")["input_ids"] == brought("<|user|> x<|end|>")["input_ids"]
    assert json.loads((export / "generation_config.json").read_text())["eos_token_id"] == brought.eos_token_id
    card = (export / "README.md").read_text()
    assert f"| `<\\|begin\\|>` {brought.bos_token_id} |" in card
    assert f"eos_token_id: {brought.eos_token_id}" in card

    store = TokenStore(next((tmp_path / "cache").glob("store-*[!k]")))
    assert store.of_tokens("ids", 0, 2).tolist() == [brought.convert_tokens_to_ids("<|user|>"), brought.eos_token_id]
    for start in (step, export):
        run = quick_run_of(f"init_from={start}")
        assert run.model.vocab_size == tokens + 9
        assert run.model.eos_token_id == brought.eos_token_id


def test_a_larger_vocabulary_in_any_layout_is_one_run(crew: Any, theirs: Path) -> None:
    """Its losses on two tensor ranks are those on one."""
    losses = []
    for tensor in (1, 2):
        run = run_from(theirs, Layout(tensor=tensor))
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=331))
        losses += [answer["losses"] for answer in crew(tensor)(train_from, run)]
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-5)  # fp32 sums in another order
