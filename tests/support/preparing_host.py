"""Prepares a text as one of several hosts: `preparing_host.py TEXT CACHE HOST HOSTS ACTION DOCUMENT`.

The host starts together with the others of HOSTS, and sees none of their locks. Before it encodes the document, it does
the action: `kill` or `stop` itself, or nothing. HOST.log beside the cache has a line for each batch that it encodes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from opt_parallel.config.run import DataConfig
from opt_parallel.data.encode import pretrain
from opt_parallel.data.encode.columns import Encoded
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.encode.tokenizer import train_tokenizer
from opt_parallel.data.prepare import prepare_store
from opt_parallel.data.store.recipe import Recipe
from opt_parallel.data.text import files, sources
from opt_parallel.data.text.records import Record, Text
from opt_parallel.data.text.sources import Corpus
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage import lock

TOKENIZER = train_tokenizer(["some words to learn from, and some more words"] * 3, 280)


class Working(TextEncoder):
    """An encoder of a host that takes some time."""

    def __init__(self, log: Path, action: str, document: str) -> None:
        super().__init__(TOKENIZER, 2, Text())
        self.log, self.action, self.document = log, action, document

    def encode(self, records: list[Record]) -> Encoded:
        time.sleep(0.05)
        with self.log.open("a") as file:
            file.write(f"{len(records)}\n")
        if any(f"document {self.document} " in record.fields["text"] for record in records):
            actions = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
            if self.action in actions:
                os.kill(os.getpid(), actions[self.action])
        return super().encode(records)


def main(text: str, cache: str, host: str, hosts: str, action: str, document: str) -> None:
    files.PIECE_BYTES = sources.PIECE_BYTES = 600
    pretrain.BATCH_CHARACTERS = 200
    lock.BEAT, lock.SILENT = 0.1, 1.5
    lock.running_kernel = lambda: host
    folder = Path(cache).parent
    for kind in ("log", "ready"):
        (folder / f"{host}.{kind}").touch()
    while not all((folder / f"{other}.ready").exists() for other in hosts):
        time.sleep(0.02)
    encoder = Working(folder / f"{host}.log", action, document)
    recipe = Recipe(Corpus.find("data.train", [text]), encoder, Text(), deduplicate=True)
    try:
        prepare_store(DataConfig(train=text, cache=cache, workers=1), "data.train", [recipe], TOKENIZER)
    except UserError as error:
        print(error)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
