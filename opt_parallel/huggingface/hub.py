"""Finds a checkpoint: a local folder, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from opt_parallel.config.paths import reach
from opt_parallel.config.secrets import refuse_secret_value
from opt_parallel.runtime.errors import UserError, one_line

# files of weights, in the order of preference; weights may instead be split, with an index of that name + INDEX_SUFFIX
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
INDEX_SUFFIX = ".index.json"
TOKENIZER = ("*.json", "merges.txt", "*.jinja")  # and config.json
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_checkpoint(name: str | Path, key: str) -> Path:
    """The folder `name`, or a snapshot of the hub id `name` with config, tokenizer and one format of weights.

    With HF_HUB_OFFLINE=1 uses earlier downloads only. Raises: UserError, which starts with `key` (such as
    `init_from=`)."""
    refuse_secret_value(key.rstrip("= "), str(name))
    if folder := reach(key, name):
        for path in folder.iterdir() if folder.is_dir() else []:
            if not path.name.startswith("rank-"):  # there may be thousands of them, and every rank runs this
                reach(key, path)
        return folder
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(f"{key}{name} does not exist: name a checkpoint's folder, or a hub id")
    try:
        if constants.HF_HUB_OFFLINE:
            # with more patterns it would require all matching files of the hub; the reader reports what is missing
            return Path(snapshot_download(str(name), local_files_only=True, allow_patterns=["config.json"]))
        wanted = [*TOKENIZER, *weights_of(HfApi().list_repo_files(str(name)))]
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except Exception as error:  # of requests, huggingface_hub or the file system: they have no common base class
        raise UserError(
            f"{key}{name} is not a local folder and could not be downloaded from the hub ({one_line(error)}): name a "
            "checkpoint's folder or another hub id; HF_HUB_OFFLINE=1 uses an earlier download"
        ) from error


def weights_of(files: list[str]) -> list[str]:
    """Patterns for the preferred format among `files`; empty if there is none, which the reader reports."""
    for single in WEIGHTS:
        if single in files or single + INDEX_SUFFIX in files:
            stem, _, ending = single.rpartition(".")
            return [single] if single in files else [f"{stem}-*.{ending}"]
    return []
