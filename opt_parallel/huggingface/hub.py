"""Finds a checkpoint: a local folder, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import huggingface_hub  # its functions are named at their use, because the first name imports for half a second
from huggingface_hub import constants

from opt_parallel.config.paths import reach
from opt_parallel.config.secrets import masked, refuse_secret_value
from opt_parallel.runtime.errors import UserError, one_line

# Names of weight files, in the order of preference. If weights are split over several files, an index lists the files.
# The name of the index is the name of the weight file with INDEX_SUFFIX.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
INDEX_SUFFIX = ".index.json"
TOKENIZER = ("*.json", "merges.txt", "*.jinja")  # the files of a tokenizer, and config.json
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Download:
    """The version of a repository to download, and settings of the download with Hugging Face's names.

    `weights` is the format of the weights (a name in WEIGHTS), or None for the preferred format. The token is not
    printed."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    weights: str | None = None


def find_checkpoint(name: str | Path, key: str, download: Download | None = None) -> Path:
    """The folder `name`, or a folder with a download of the hub id `name`.

    The download contains the configuration, the tokenizer, and the weights in one format. With HF_HUB_OFFLINE=1, only
    earlier downloads are used. Raises: UserError, whose message starts with `key` (such as `init_from=`)."""
    refuse_secret_value(key.rstrip("= "), str(name))
    if folder := reach(key, name):
        for path in folder.iterdir() if folder.is_dir() else []:
            if not path.name.startswith("rank-"):  # a checkpoint may have thousands of these files
                reach(key, path)
        return folder
    if not HUB_ID.fullmatch(str(name)):
        raise UserError(f"{key}{name} does not exist: name a checkpoint's folder, or a hub id")
    try:
        return _snapshot(str(name), download or Download())
    except Exception as error:  # errors of requests, huggingface_hub and the file system have no common base class
        raise UserError(
            f"{key}{name} is not a local folder and could not be downloaded from the hub ({masked(one_line(error))}): "
            "name a checkpoint's folder or another hub id; HF_HUB_OFFLINE=1 uses an earlier download"
        ) from error


def _snapshot(name: str, download: Download) -> Path:
    """The folder of a repository in the hub's cache, which is downloaded if it is not complete."""
    fetch = partial(
        huggingface_hub.snapshot_download, name, revision=download.revision, cache_dir=download.cache_dir,
        token=download.token,
    )  # fmt: skip
    if constants.HF_HUB_OFFLINE or download.local_files_only:
        # With more patterns, this call would require all matching files of the hub. Missing files are reported when
        # they are read.
        return Path(str(fetch(local_files_only=True, allow_patterns=["config.json"])))
    files = huggingface_hub.HfApi(token=download.token).list_repo_files(name, revision=download.revision)
    if download.weights is not None:
        files = [file for file in files if file.startswith(Path(download.weights).stem)]
    return Path(str(fetch(allow_patterns=[*TOKENIZER, *weights_of(files)])))


def weights_of(files: list[str]) -> list[str]:
    """The file patterns of the preferred format of weights among `files`, or an empty list if there are no weights."""
    for single in WEIGHTS:
        if single in files or single + INDEX_SUFFIX in files:
            stem, _, ending = single.rpartition(".")
            return [single] if single in files else [f"{stem}-*.{ending}"]
    return []


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    message: str,
    writes: bool,
) -> str:
    """Call `save(folder)` with a temporary folder, and upload the folder to a repository of the hub.

    A missing repository is created. The result is the repository's address. All ranks must call this function, and the
    rank for which `writes` is true uploads the folder.

    Raises: UserError, whose message never contains the token."""
    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"push_to_hub: {masked(repo_id)} is not a repository's name: give OWNER/NAME")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        if not writes:
            return repo_id
        try:
            api = huggingface_hub.HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        except Exception as error:  # errors of requests, huggingface_hub and the file system share no base class
            why = one_line(error).replace(str(token), "…") if isinstance(token, str) and token else one_line(error)
            raise UserError(
                f"push_to_hub: the model could not be uploaded to {repo_id} ({masked(why)}): check its name, the token "
                "(token=, or HF_TOKEN in the environment) and the network"
            ) from None
    return str(address)
