"""Write English text for first experiments, from Python's own documentation, to train.jsonl and validation.jsonl.

    python scripts/demo_text.py --output data/demo [--source FOLDER]

The default text is the language reference and the docstrings of the standard library, which is parsed and not imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from opt_parallel.config.model import require
from opt_parallel.config.options import parsed
from opt_parallel.data.text.python_text import python_documents, split, write_split
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.errors import UserError, reporting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--source", type=Path, help="folder of text files to use instead")
    arguments = parsed(parser)
    documents = python_documents() if arguments.source is None else _from_folder(arguments.source)
    train, validation, removed = split(documents)
    source = arguments.source or "this Python"
    require(
        bool(train and validation),
        f"{source} has too little text to split ({len(train)} documents for training, {len(validation)} for "
        "validation): name a larger --source",
    )
    try:
        write_split(arguments.output, train, validation)
    except OSError as error:
        raise UserError(f"--output {arguments.output} cannot be written ({error}): choose another folder") from error
    print(
        f"{arguments.output}: train {len(train):,} documents, {sum(map(len, train)):,} characters; "
        f"validation {len(validation):,} documents, {sum(map(len, validation)):,} characters; "
        f"{removed:,} near-duplicates of training text removed"
    )
    return 0


def _from_folder(folder: Path) -> Iterator[str]:
    require(folder.is_dir(), f"--source {folder} is not a folder: name a folder with text files")
    return (text for text in Corpus.find("--source", [str(folder)], "text").documents() if text)


if __name__ == "__main__":
    with reporting():
        sys.exit(main())
