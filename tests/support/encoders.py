"""Encoders of text that a test can slow down or stop. Child processes import this module, and not the test's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tokenizers import Tokenizer

from opt_parallel.data.encode.columns import Encoded
from opt_parallel.data.encode.pretrain import TextEncoder
from opt_parallel.data.text.records import Record, Text


class Slow(TextEncoder):
    """An encoder that takes 0.3 s for each batch."""

    def encode(self, records: list[Record]) -> Encoded:
        time.sleep(0.3)
        return super().encode(records)


class Watched(TextEncoder):
    """An encoder that logs which records it encodes, and does `action` before the record that contains `trap`."""

    def __init__(self, tokenizer: Tokenizer, log: Path, trap: str = "", action: str = "") -> None:
        super().__init__(tokenizer, 2, Text())
        self.log, self.trap, self.action = log, trap, action

    def encode(self, records: list[Record]) -> Encoded:
        for record in records:
            if self.trap and self.trap in record.fields["text"]:
                if self.action == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.action == "slow":
                    time.sleep(3)
                if self.action == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if self.action == "hang":
                    time.sleep(1000)
                if self.action == "change":
                    os.utime(record.where.partition(": ")[2].rpartition(",")[0], ns=(1, 1))
            with self.log.open("a") as file:
                file.write(f"{record.fields['text']}\n")
        return super().encode(records)
