"""Detect secrets in configuration keys, environment variables and values.

A run's configuration is written to files and sent to experiment trackers, so secrets are accepted in environment
variables only. No message repeats a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

from opt_parallel.runtime.errors import UserError

# The last word of a secret's name, as in hf_token, X-Amz-Signature and SSH_KEY. The names eos_token_id and
# max_new_tokens end differently, so they are no secrets.
LAST = {
    "apikey", "auth", "authorization", "credential", "credentials", "jwt", "key", "pass", "passphrase", "pat", "pwd",
    "sas", "sig", "signature", "token",
}  # fmt: skip
ANYWHERE = re.compile(r"(access|account|api|private)_?key|connection_?string|passw(or)?d|secret", re.IGNORECASE)
A_PATH = {"dir", "file", "folder", "home", "path", "sock"}  # HF_TOKEN_PATH names a path and not a secret
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
FOLDERS = {"PWD", "OLDPWD"}
SHORTEST = 16  # minimum length of a variable's value to search for; shorter values may be ordinary words

# USER finds https://user:password@host and https://token@host anywhere in a value. BARE_USER matches a value that is
# user:password@host as a whole.
USER = re.compile(r"(?:^|:)//([^\s@/:]*:(?!\d+/)[^\s@]+|[^\s@/:?#]{16,})@")
BARE_USER = re.compile(r"[\w.+-]+:([^\s@/:]+)@[\w-]+(?:\.[\w-]+)*(?::\d+)?(?:/.*)?", re.DOTALL)
# PARAMETER finds the values in the query of a URL or a connection string. ASSIGNED finds key=value elsewhere, with at
# least six characters, since prose may hold "a token=1".
PARAMETER = re.compile(r"[?&;#]([\w.%-]+)=([^\s&;#]+)")
ASSIGNED = re.compile(r"(?<![^\s\[{(,'\"])([\w-]+)=([^\s,;'\"]{6,})")
# These keys are no secrets in key=value, which may be a folder name of partitioned data.
WORDS = {"auth", "key", "pass"}
FLAG = re.compile(r"(?<!\S)--([\w-]+)\s+(\S{6,})")
# TOKEN finds tokens of Hugging Face, GitHub, GitLab, AWS, OpenAI, Slack, Google, npm, PyPI, wandb and NVIDIA, JSON web
# tokens, HTTP authorization headers, and private keys in PEM format.
TOKEN = re.compile(
    r"(\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bA[KS]IA[0-9A-Z]{16}"
    r"|\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|\bglpat-[\w-]{16,}|\bxox[a-z]-[\w-]{10,}|\bAIza[\w-]{30,}"
    r"|\bnpm_[A-Za-z0-9]{30,}|\bpypi-[\w-]{30,}|\bwandb_v\d_\w{20,}|\bnvapi-[\w-]{20,}"
    r"|\bapi_org_[A-Za-z]{20,}"
    r"|(?i:\bbearer\s+)(?=\S*\d)[\w.~+/-]{16,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}[\w.-]*|(?i:authorization\W{1,3}\w+\s+\S+)|-----BEGIN[ A-Z]* PRIVATE KEY-----.*)",
    re.DOTALL,
)


def looks_secret(name: str) -> bool:
    """Whether the name of a key, an environment variable or a URL parameter is that of a secret."""
    words = [word.lower() for word in WORD.findall(name)]
    if not words or words[-1] in A_PATH or name in FOLDERS:
        return False
    return words[-1] in LAST or ANYWHERE.search(name) is not None


def secrets_in(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and description of each secret in a value. The description does not repeat the secret."""
    users = [*USER.finditer(text), *filter(None, [BARE_USER.fullmatch(text)])]
    yield from ((*match.span(1), "a user's password") for match in users)
    yield from (
        (*match.span(2), f"{match[1]}=…") for match in PARAMETER.finditer(text) if looks_secret(unquote(match[1]))
    )
    for match in (*ASSIGNED.finditer(text), *FLAG.finditer(text)):
        if looks_secret(match[1]) and match[1] not in WORDS:
            yield *match.span(2), f"{match[1]}=…"
    yield from ((*match.span(1), "a token") for match in TOKEN.finditer(text))
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and looks_secret(name) and (start := text.find(value)) >= 0:
            yield start, start + len(value), f"the value of {name}"


def masked(text: str) -> str:
    """The text with every secret replaced by the character `…`."""
    shown, end = "", 0
    for start, stop, _ in sorted(secrets_in(text)):
        if stop > end:
            shown, end = f"{shown}{text[end:start]}…", stop
    return shown + text[end:]


def refuse_secret_name(key: str) -> None:
    """Raise UserError if the last part of a dotted key is the name of a secret."""
    if looks_secret(key.rpartition(".")[2]):
        raise UserError(
            f"{masked(key)} looks like a secret, and a run's configuration is written to files: leave it out, and set "
            "an environment variable such as HF_TOKEN or WANDB_API_KEY"
        )


def refuse_secret_value(key: str, text: str) -> None:
    """Raise UserError if a value holds a secret. `key` is the key or option that set the value."""
    for *_, what in secrets_in(text):
        raise UserError(
            f"{masked(key)} holds {what}, which looks like a secret, and a command's arguments are written to "
            "files: leave it out, and set an environment variable such as HF_TOKEN or WANDB_API_KEY; download the text "
            "of a signed URL first"
        )
