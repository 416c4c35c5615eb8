"""Finds the files of a metaseq checkpoint in a folder, and sorts them by part and shard."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from opt_parallel.huggingface.hub import INDEX_SUFFIX
from opt_parallel.huggingface.hub import WEIGHTS as FORMATS
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.foreign import file_in

# checkpoint_last-model_part-3-shard17.pt, reshard-model_part-0.pt, checkpoint_1_4000.pt-model_part-0.pt, restored.pt
# Some file systems change the case of names.
NAME = re.compile(r"(?i)(?P<stem>.+?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
ALONE = re.compile(r"(?i)restored\.pt|reshard\.pt|.*consolidated\.pt")  # Names of complete checkpoints in one file.
ARRAY = re.compile(r"(?:model\.)?((?:decoder\.|lm_head\.)[\w.]+?)(?:\.npy)?")
EMBEDDING = "decoder.embed_tokens.weight"


@dataclass(frozen=True)
class Group:
    """The files of one checkpoint: by number of part and shard, or in a folder of arrays by the tensor's name.

    `pattern` is their name with * instead of numbers."""

    pattern: str
    files: dict[tuple[int, int], Path]
    arrays: dict[str, Path]

    @property
    def parts(self) -> int:
        return 1 + max((part for part, _ in self.files), default=0)

    @property
    def shards(self) -> int:
        return 1 + max((shard for _, shard in self.files), default=0)

    @property
    def paths(self) -> list[Path]:
        return [path for _, path in sorted(self.files.items())] or sorted(self.arrays.values())


def is_metaseq(folder: Path) -> bool:
    """Whether the folder holds a metaseq checkpoint."""
    return bool(_grouped(folder))


def group_in(folder: Path) -> Group:
    """The files of the checkpoint in `folder`.

    Raises: UserError if the folder holds several checkpoints, or if a part or shard is missing or occurs twice."""
    groups = _grouped(folder)
    kinds = [f"{pattern} ({len(names)} file{'s' * (len(names) > 1)})" for pattern, names in groups.items()]
    if _holds_hugging_face(os.listdir(folder)):
        kinds.append("the weights of a Hugging Face folder")
    if len(kinds) > 1:
        raise UserError(
            f"{folder} is ambiguous, because it holds several checkpoints: {' and '.join(kinds)}: move all but one of "
            "them into other folders"
        )
    ((pattern, names),) = groups.items()
    if not NAME.fullmatch(names[0]):
        return Group(pattern, {}, _arrays(folder, names))
    files: dict[tuple[int, int], Path] = {}
    for name in names:
        number = _numbers(name)
        if number in files:
            raise UserError(f"{folder / name} and {files[number].name} have the same numbers: remove one of them")
        path = file_in(folder, name)
        if path is None:
            raise UserError(f"{folder / name} disappeared while the folder was read: try again")
        files[number] = path
    _require_all(folder, pattern, files)
    return Group(pattern, files, {})


def _arrays(folder: Path, names: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in names:
        match, path = ARRAY.fullmatch(name), file_in(folder, name)
        assert match is not None
        if path is not None and found.setdefault(match[1], path) != path:
            raise UserError(f"{path} and {found[match[1]].name} hold the same tensor: remove one of them")
    return found


def _require_all(folder: Path, pattern: str, files: dict[tuple[int, int], Path]) -> None:
    """Raise UserError unless each part has the shards 0, 1, … and all parts have as many."""
    parts, shards = (1 + max(numbers) for numbers in zip(*files, strict=True))
    missing = parts * shards - len(files)
    if missing:
        wanted = ((part, shard) for part in range(parts) for shard in range(shards))
        part, shard = next(number for number in wanted if number not in files)
        name = pattern.replace("-model_part-*", f"-model_part-{part}").replace("-shard*", f"-shard{shard}")
        what = f" and {missing - 1:,} more are missing" if missing > 1 else " is missing"
        raise UserError(f"{folder / name}{what}: use a complete copy")


def _grouped(folder: Path) -> dict[str, list[str]]:
    """The names of metaseq's files in a folder, by their pattern.

    In a folder of a run or of Hugging Face, other files end with .pt too, such as optimizer.pt. So there only names
    that no other program uses count."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    foreign, found = _holds_hugging_face(names), defaultdict(list)
    spelled: dict[str, str] = {}
    for name in names:
        match = NAME.fullmatch(name)
        if match and (match["part"] or match["shard"] or ALONE.fullmatch(name) or not foreign):
            part, shard = "-model_part-*" * bool(match["part"]), "-shard*" * bool(match["shard"])
            pattern = f"{match['stem']}{part}{shard}.pt"
            found[spelled.setdefault(pattern.lower(), pattern)].append(name)
    arrays = [name for name in names if ARRAY.fullmatch(name)]
    if any(name.removesuffix(".npy").endswith(EMBEDDING) for name in arrays):
        found[f"{EMBEDDING} and other arrays"] = arrays
    return dict(found)


def _holds_hugging_face(names: list[str]) -> bool:
    return any(single in names or single + INDEX_SUFFIX in names for single in FORMATS)


def _numbers(name: str) -> tuple[int, int]:
    """The numbers of part and shard in the name of a file, 0 for a number that the name does not have."""
    match = NAME.fullmatch(name)
    assert match is not None
    return int(match["part"] or 0), int(match["shard"] or 0)
