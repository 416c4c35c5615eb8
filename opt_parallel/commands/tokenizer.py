"""Train a tokenizer.

opt-parallel tokenizer --input 'data/*.jsonl' --vocab-size 50272 --output tokenizer"""

from __future__ import annotations

import argparse
from pathlib import Path

from opt_parallel.config.options import parsed
from opt_parallel.runtime.errors import UserError, reporting
from opt_parallel.runtime.log import quiet_libraries


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders, globs, or ids of datasets on the hub"
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="maximum number of tokens; OPT's vocabulary has 50272"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--text-field", default="text", help="field of a record that holds its text; default: text")
    return parser


def main() -> None:
    arguments = parsed(parser())
    quiet_libraries()
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output} exists: remove it or choose another folder")
    from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
    from opt_parallel.data.prepare import in_proportion
    from opt_parallel.data.text.sources import Corpus

    corpus = Corpus.find("--input", arguments.input, arguments.text_field)
    tokenizer = train_tokenizer(in_proportion([corpus]), arguments.vocab_size, "--vocab-size ")
    try:
        save_tokenizer(tokenizer, arguments.output)
    except OSError as error:
        raise UserError(
            f"--output {arguments.output} cannot be written ({error.strerror}): choose another folder"
        ) from error
    print(f"{tokenizer.get_vocab_size():,} tokens, trained on {corpus.names}: {arguments.output}")


def run() -> None:
    with reporting():
        main()
