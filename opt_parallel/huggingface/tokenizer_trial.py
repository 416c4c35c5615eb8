"""Tests an unknown tokenizer before it is used, in a child process with limits of time and memory.

A tokenizer's regular expressions and replacements may take forever or need unlimited memory, and errors of the library
may end the process. A tokenizer that consists only of harmless parts, such as that of OPT, is not tested.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.foreign import parse_json

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Types of parts whose time and output are linear in the length of the text.
HARMLESS = {
    "BertNormalizer", "BertPreTokenizer", "BertProcessing", "BPEDecoder", "ByteFallback", "ByteLevel",
    "CharDelimiterSplit", "Digits", "Fuse", "Lowercase", "Metaspace", "NFC", "NFD", "NFKC", "NFKD", "Nmt",
    "Punctuation", "RobertaProcessing", "Sequence", "Strip", "StripAccents", "TemplateProcessing", "UnicodeScripts",
    "Whitespace", "WhitespaceSplit",
}  # fmt: skip
HARMLESS_MODELS = {"BPE", "WordLevel"}
# Maximum seconds of CPU time to load a tokenizer and to test it, maximum seconds of wall time for both steps, and
# maximum bytes for each step.
TO_LOAD, TO_TRY, TIMEOUT = 20, 4, 120
BYTES_TO_LOAD, BYTES_TO_TRY = 4 * 10**9, 2 * 10**8
RUN, MOST_CHARACTERS = 1000, 40  # length of a run of one character, and maximum number of characters that are tested
TRIAL = """
import contextlib, json, resource, sys

def limit(seconds, size):
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds += round(used.ru_utime + used.ru_stime)
    with contextlib.suppress(ValueError, OSError):  # a system without such a limit
        size += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))

limit(int(sys.argv[1]), int(sys.argv[2]))
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_str(sys.stdin.readline())
print("loaded", flush=True)
limit(int(sys.argv[3]), int(sys.argv[4]))
for text in json.loads(sys.stdin.readline()):
    tokenizer.decode(tokenizer.encode(text).ids)
"""
_tried: set[bytes] = set()


def require_bounded(content: str, where: str) -> None:
    """Raise UserError unless the tokenizer.json with this `content` works within the limits of time and memory.
    `where` names it in the message.

    Raises: ValueError if the content is not a tokenizer."""
    values = parse_json(content.encode())
    parts, model = [values.get(part) for part in PARTS], values.get("model") or {}
    if _types_in(parts) <= HARMLESS and model.get("type") in HARMLESS_MODELS:
        return
    digest = hashlib.sha256(content.encode()).digest()
    if digest in _tried:
        return
    given = f"{json.dumps(values)}\n{json.dumps(_texts(parts))}\n"
    limits = map(str, (TO_LOAD, BYTES_TO_LOAD, TO_TRY, BYTES_TO_TRY))
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", TRIAL, *limits], input=given.encode(), capture_output=True, timeout=TIMEOUT,
            check=False, env={"TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(_refusal(where, f"takes over {TIMEOUT} s")) from None
    lines = [line for line in process.stderr.decode(errors="replace").splitlines() if line.strip()]
    if process.returncode == -signal.SIGXCPU:
        raise UserError(_refusal(where, f"takes over {TO_TRY} s"))
    if process.returncode:  # after a signal, the first line states the cause; after an error, the last line does
        cause = lines[0 if process.returncode < 0 else -1] if lines else f"status {process.returncode}"
        raise UserError(_refusal(where, f"fails ({cause:.200})")) if process.stdout else ValueError(cause)
    _tried.add(digest)


def _refusal(where: str, what: str) -> str:
    return f"{where} {what} on texts of {RUN:,} characters: use another tokenizer"


def _types_in(part: Any) -> set[str]:
    """The types of all parts of a tokenizer, including parts of parts."""
    if isinstance(part, list):
        return set().union(*map(_types_in, part))
    if not isinstance(part, dict):
        return set()
    own = {str(part["type"])} if "type" in part else set()
    return own.union(*map(_types_in, part.values()))


def _texts(parts: list[Any]) -> list[str]:
    """Texts that may make a tokenizer slow.

    The texts are long runs of a common character or of a character in the tokenizer's patterns, and runs of two
    alternating characters. Each run is followed by a different character."""
    usual = "a0 \n.\té漢"
    named = [character for pattern in _strings(parts) for character in pattern if character not in "\\()[]{}|?*+^$"]
    characters = list(dict.fromkeys([*usual, *named]))[:MOST_CHARACTERS]
    runs = [character * RUN for character in characters]
    alternating = [(one + other) * (RUN // 2) for one, other in pairwise(characters)]
    return [f"{run}{end}" for run in (*runs, *alternating, "".join(characters) * 20) for end in ("!", "\0")]


def _strings(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, (list, dict)):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _strings(inner)
