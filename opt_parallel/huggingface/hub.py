"""Where a checkpoint lies: a folder here, or one fetched from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from opt_parallel.config.paths import reach
from opt_parallel.config.secrets import refuse_secret_value
from opt_parallel.runtime.errors import UserError, one_line

# whole weights in one file, in the order of preference; each may be split instead, with its name + INDEX_SUFFIX
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
INDEX_SUFFIX = ".index.json"
TOKENIZER = ("*.json", "merges.txt", "*.jinja")  # and config.json
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_checkpoint(name: str | Path, key: str) -> Path:
    """The folder `name`, or the snapshot of the hub id `name`: config, tokenizer and one format of weights.

    With HF_HUB_OFFLINE=1 what was fetched before. Raises: UserError, which begins with `key`, as `init_from=`."""
    refuse_secret_value(key.rstrip("= "), str(name))
    if folder := reach(key, name):
        for path in folder.iterdir() if folder.is_dir() else []:
            if not path.name.startswith("rank-"):  # those may be thousands, and every rank is here
                reach(key, path)
        return folder
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(f"{key}{name} does not exist: name a checkpoint's folder, or a hub id")
    try:
        if constants.HF_HUB_OFFLINE:
            # asked for more, it would insist on all that the hub has of it; what is missing the reader says
            return Path(snapshot_download(str(name), local_files_only=True, allow_patterns=["config.json"]))
        wanted = [*TOKENIZER, *weights_of(HfApi().list_repo_files(str(name)))]
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except Exception as error:  # requests', the hub's own and the file system's, with no common root
        raise UserError(
            f"{key}{name} is no folder here, and the hub did not give it ({one_line(error)}): name a checkpoint's "
            "folder or another hub id; HF_HUB_OFFLINE=1 takes what was fetched before"
        ) from error


def weights_of(files: list[str]) -> list[str]:
    """Patterns of the best format that is there; none if there is none, which the reader will say."""
    for single in WEIGHTS:
        if single in files or single + INDEX_SUFFIX in files:
            stem, _, ending = single.rpartition(".")
            return [single] if single in files else [f"{stem}-*.{ending}"]
    return []
