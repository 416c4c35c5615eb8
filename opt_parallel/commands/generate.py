"""Continue prompts with a trained model, greedily by default.

opt-parallel generate --checkpoint DIR --prompt TEXT
torchrun --nproc-per-node 2 -m opt_parallel generate --tensor 2 --checkpoint DIR --prompt TEXT

The continuation of a single prompt is printed token by token. With several prompts, all texts are printed at the
end."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opt_parallel.config.options import parsed
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import UserError, reporting
from opt_parallel.runtime.log import quiet_libraries, say
from opt_parallel.storage.atomic import write_text
from opt_parallel.storage.foreign import read_limited

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from opt_parallel.checkpoint.sources import Opened
    from opt_parallel.config.model import ModelConfig
    from opt_parallel.model.decoding import Decoding
    from opt_parallel.model.heads import CausalLM
    from opt_parallel.parallel.topology import Topology


def main() -> None:
    arguments = parsed(parser())
    check(arguments)
    prompts = read_prompts(arguments)
    quiet_libraries()
    import torch

    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.config.data import SpecialTokens
    from opt_parallel.data.encode.tokenizer import encode_prompt
    from opt_parallel.model.decoding import Decoding, check_fits
    from opt_parallel.parallel.topology import Topology

    settings = ("max_new_tokens", "temperature", "top_k", "top_p", "beams", "length_penalty", "seed")
    decoding = Decoding(**{name: getattr(arguments, name) for name in settings})
    opened = open_checkpoint(arguments.checkpoint)
    opened.config.check_splits(arguments.tensor, "--tensor ")
    tokenizer = tokenizer_of(opened)
    spelled = SpecialTokens[arguments.special_tokens] if arguments.special_tokens else opened.special_tokens
    encoded = [encode_prompt(tokenizer, prompt, opened.config, spelled) for prompt in prompts]
    check_fits(opened.config, decoding, max(map(len, encoded)))
    with Topology.open(arguments.tensor) as topology, torch.inference_mode():
        dtype = dtype_of(arguments, opened, topology, encoded)
        opened = open_checkpoint(arguments.checkpoint, checksums=True)  # verifies all checksums
        model = opened.model(topology.tensor, topology.device, dtype)
        if len(prompts) == 1 and decoding.beams == 1 and arguments.output is None:
            stream(model, tokenizer, encoded[0], decoding)
            return
        texts = write(model, tokenizer, encoded, decoding, arguments.batch)
    if arguments.output is None:
        say("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))
    elif process.is_main():
        save(arguments.output, prompts, texts)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, help="…/checkpoints/step-<N>, a Hugging Face or metaseq folder, or a hub id"
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    prompts.add_argument(
        "--prompts-file",
        type=Path,
        help='a text file with one prompt per line, or a .jsonl file with the field "prompt"',
    )
    parser.add_argument(
        "--output", type=Path, help="a new .jsonl file for the prompts and texts, which are then not printed"
    )
    parser.add_argument(
        "--special-tokens", choices=("text", "tokens"),
        help="encoding of a special token's spelling in a prompt, such as </s>; default: the checkpoint's, else text",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): greedy; 1: sample the model's distribution"
    )
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens with this total probability"
    )
    parser.add_argument("--beams", type=int, default=1, help="number of beams; 1: no beam search")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="length penalty of beam search; above 1 favours long texts"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--batch", type=int, default=8, help="number of prompts in a batch; does not change the texts")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel degree, the number of processes")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="auto", help="auto: the checkpoint's dtype if the device supports it"
    )
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for mistakes that can be detected without the checkpoint."""
    for name in ("batch", "tensor"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} must be at least 1")
    processes, tensor = process.world_size(), arguments.tensor
    if processes != tensor:
        raise UserError(
            f"--tensor {tensor} needs {tensor} processes, but {processes} started: "
            f"torchrun --nproc-per-node {tensor} -m opt_parallel generate --tensor {tensor} …"
        )
    output = arguments.output
    if output is not None and output.exists():
        raise UserError(f"--output {output} exists: remove it or choose another file")
    if output is not None and not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: {output.parent} is not a writable folder")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts in their order. Raises: UserError with the number of the malformed line."""
    path: Path | None = arguments.prompts_file
    if path is None:
        return arguments.prompt
    if path.exists() and not path.is_file():
        raise UserError(f"--prompts-file {path} is not a regular file: write the prompts to a file")
    try:
        text = read_limited(path).decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts-file {path} cannot be read: {error}") from error
    if not text:
        raise UserError(f"--prompts-file {path} is empty: write one prompt per line")
    lines = text.removesuffix("\n").split("\n")
    return [_prompt_of(line, f"{path}, line {number}", path.suffix) for number, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str, suffix: str) -> str:
    if suffix != ".jsonl":
        if not line.strip():
            raise UserError(f"{where} is blank: write a prompt, or remove the line")
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where} has no field "prompt" with a text: add it, or remove the line')
    return row["prompt"]


def tokenizer_of(opened: Opened) -> Tokenizer:
    """The tokenizer of the checkpoint. Raises: UserError if there is no tokenizer, or if the tokenizer has more tokens
    than the model's vocabulary."""
    from opt_parallel.data.encode.tokenizer import load_tokenizer
    from opt_parallel.huggingface.tokenizer import count_tokens

    if not any((opened.tokenizer / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"--checkpoint: {opened.tokenizer} has no tokenizer: copy the model's tokenizer.json there")
    tokenizer = load_tokenizer(str(opened.tokenizer))
    tokens, rows = count_tokens(tokenizer), opened.config.vocab_size
    if tokens > rows:
        raise UserError(
            f"--checkpoint: the tokenizer in {opened.tokenizer} has {tokens} tokens, but the model has {rows}: "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def dtype_of(
    arguments: argparse.Namespace, opened: Opened, topology: Topology, prompts: list[list[int]]
) -> torch.dtype:
    """The dtype of the computation. Raises: UserError on every rank if the model does not fit into memory."""
    import torch

    from opt_parallel.checkpoint.memory import SCRIPT, choose_dtype

    config, rows = opened.config, min(len(prompts), arguments.batch) * arguments.beams
    kept = 2 * config.num_hidden_layers * config.hidden_size // arguments.tensor  # keys and values of a token
    tokens = rows * (max(map(len, prompts)) + arguments.max_new_tokens)
    asked = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return choose_dtype(opened, topology, asked, SCRIPT, tokens * kept)


def stream(model: CausalLM, tokenizer: Tokenizer, prompt: list[int], decoding: Decoding) -> None:
    """Print a prompt and its continuation. Each character is printed as soon as all its tokens are generated."""
    import torch
    from tokenizers.decoders import DecodeStream

    from opt_parallel.model.generation import generate

    decoder, shown = DecodeStream(skip_special_tokens=True), ""

    def show(tokens: list[int]) -> None:
        nonlocal shown
        piece = "".join(decoder.step(tokenizer, token) or "" for token in tokens)
        shown += piece
        if process.is_main():
            print(piece, end="", flush=True)

    show(prompt)
    ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    output = generate(model, ids, decoding=decoding, on_tokens=show)
    say(tokenizer.decode(output[0].tolist()).removeprefix(shown))  # the rest, whose last character may be incomplete


def write(model: CausalLM, tokenizer: Tokenizer, prompts: list[list[int]], decoding: Decoding, batch: int) -> list[str]:
    """The continuation of each prompt, generated for `batch` prompts at a time."""
    from opt_parallel.data.encode.tokenizer import decode_continuation
    from opt_parallel.model.generation import generate, left_padded

    config: ModelConfig = model.decoder.config
    texts = []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        ids, mask = left_padded(some, config.pad_token_id, model.lm_head.weight.device)
        output = generate(model, ids, mask, decoding, first_row=first)
        for row, prompt in zip(output.tolist(), some, strict=True):
            unpadded = row[ids.size(1) - len(prompt) :]
            texts.append(decode_continuation(tokenizer, unpadded, len(prompt)))
    return texts


def save(path: Path, prompts: list[str], texts: list[str]) -> None:
    """Write the prompts and their continuations atomically to a new file. Raises: UserError."""
    rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    try:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), replace=False)
    except FileExistsError as error:
        raise UserError(f"--output {path} exists now: remove it or choose another file") from error
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written ({error.strerror}): free space, or choose another file"
        ) from error
    print(f"{len(rows)} texts in {path}", file=sys.stderr)


def run() -> None:
    with reporting():
        main()
