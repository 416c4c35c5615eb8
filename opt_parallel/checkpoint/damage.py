"""Checks a checkpoint's manifest and files, and whether the files contain the tensors that the manifest lists."""

from __future__ import annotations

import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from opt_parallel.checkpoint.folders import step_of, steps_in
from opt_parallel.checkpoint.inherit import model_at
from opt_parallel.checkpoint.manifest import MANIFEST, STEP, Damaged, file_in, read_manifest, wrong_size
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.checkpoint.stored import StoredFile
from opt_parallel.model.heads import SCORE, CausalLM
from opt_parallel.parallel.shard import logical_shapes
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime import process
from opt_parallel.runtime.errors import UserError

CHUNK = 2**20  # bytes that are read at a time; a chunk fits the CPU's cache, from which its checksum is computed
TOKENIZER = "tokenizer/tokenizer.json"


def read_share(folder: Path, share: int, of: int) -> tuple[CheckpointReader | None, list[str]]:
    """Divide a checkpoint's files into `of` shares, and check the files of share number `share`.

    The result is a reader (None if the manifest is damaged) and a list of errors. Each error starts with the name of a
    file."""
    try:
        reader = CheckpointReader(folder)
        _check_tensors(reader)
        file_in(folder, TOKENIZER)
    except Damaged as error:
        return None, [error.what]
    step, named = reader.clock.step, STEP.fullmatch(folder.name)
    wrong = [f"{MANIFEST} is of step {step}"] if named and int(named[1]) != step else []
    files = list(reader.manifest["files"].items())[share::of]
    return reader, wrong + [what for name, written in files if (what := _damage_of(reader, name, written))]


def open_checked(folder: Path) -> CheckpointReader:
    """Open a checkpoint after checking this process's share of its files. Raises: Damaged."""
    reader, wrong = read_share(folder, process.rank(), process.world_size())
    if reader is None or wrong:
        raise Damaged(folder, wrong[0])
    return reader


def damage_in(folder: Path) -> list[str]:
    """A list of all errors in a checkpoint, all of whose files are read."""
    return read_share(folder, 0, 1)[1]


def tokenizer_of(folder: Path | None) -> Path | None:
    """The tokenizer of the checkpoint `folder`, or None if no checkpoint has a tokenizer.

    If the checkpoint is damaged, the result is the tokenizer of the previous checkpoint, from which the run resumes."""
    if folder is None:
        return None
    for step in reversed([step for step in steps_in(folder.parent) if step <= (step_of(folder) or 0)]):
        each = folder.parent / f"step-{step}"
        with suppress(UserError):  # raised if the manifest is damaged
            files = read_manifest(each)["files"].items()
            if not any(_differs(each, *file) for file in files if file[0].startswith("tokenizer/")):
                return each / "tokenizer"
    return None


def _check_tensors(reader: CheckpointReader) -> None:
    """Raise Damaged unless the manifest lists the tensors of the network that the manifest describes.

    The tensors of a LoRA run are checked later, together with its base."""
    model, labels = model_at(reader.folder, ""), reader.manifest.get("labels")
    if reader.manifest.get("base"):
        return
    with torch.device("meta"):
        wanted = logical_shapes(CausalLM(model, ALONE))
    if labels is not None:
        wanted[SCORE] = (len(labels["names"]), model.embedding_size)
    if reader.shapes != wanted:
        raise Damaged(reader.folder, f"{MANIFEST} lists other tensors than those of the network that it describes")


def check_sizes(reader: CheckpointReader) -> None:
    """Raise Damaged unless each file exists and has the size that the manifest states. No file is read."""
    file_in(reader.folder, TOKENIZER)
    for name, written in reader.manifest["files"].items():
        wrong = wrong_size(reader.folder, name, written)
        if wrong is not None:
            raise Damaged(reader.folder, wrong)


def checksum_of(path: Path) -> str:
    """The CRC-32 checksum of a file, in hexadecimal."""
    checksum, buffer = 0, bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
    return f"{checksum:08x}"


def _damage_of(reader: CheckpointReader, name: str, written: dict[str, Any]) -> str | None:
    wrong = _differs(reader.folder, name, written)
    if wrong or name not in reader.fragments.files:
        return wrong
    try:
        held = StoredFile(reader.folder / name).sizes
    except Damaged as error:
        return error.what
    return None if held == reader.fragments.sizes_in(name) else f"{name} does not contain the fragments of its table"


def _differs(folder: Path, name: str, written: dict[str, Any]) -> str | None:
    wrong = wrong_size(folder, name, written)
    if wrong:
        return wrong
    try:
        return None if checksum_of(folder / name) == written["crc32"] else f"{name} differs from its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
