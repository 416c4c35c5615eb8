"""Reads and checks `manifest.json`, which describes a checkpoint and is its last file (docs/checkpoint-format.md)."""

from __future__ import annotations

import functools
import math
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Gt, Lt, MaxLen, MinLen
from typing_extensions import TypedDict

from opt_parallel.config.values import flat
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.checked import Count, Integer, Size, is_deep, read_checked

MANIFEST = "manifest.json"
FORMAT = 2
STEP = re.compile(r"step-(0|[1-9][0-9]*)")  # The name of a checkpoint's folder.
LARGEST = 2**29  # Maximum bytes. OPT-175B saved by a thousand ranks needs a fifth in format 1, and 250 KB in format 2.

Positive = Annotated[float, Gt(0), Lt(math.inf)]


class Clock(TypedDict):
    step: Count
    samples: Count
    tokens: Count
    mixed: NotRequired[Count]
    taken: NotRequired[dict[str, Count]]
    orders: NotRequired[dict[str, str]]


class LossScale(TypedDict):
    scale: Positive
    good_steps: Count
    moved_window: Size | None


Layout = TypedDict(
    "Layout",
    {
        "world size": Size,
        "tensor": Size,
        "data": Size,
        "zero.stage": Count,
        "zero.offload": str,
        "precision": str,
    },
)


class Lora(TypedDict):
    rank: Count
    alpha: Positive
    targets: list[str]


class Task(TypedDict):
    lora: NotRequired[Lora]


Texts = str | list[Any] | dict[str, Any] | None


class Data(TypedDict):
    train: Texts
    validation: Texts
    sequence_length: Size


class Named(TypedDict):
    name: str


class Optimizer(TypedDict):
    name: NotRequired[str]


class Checkpoint(TypedDict):
    keep: Size
    keep_every: NotRequired[Count]
    keep_best: NotRequired[bool]


class Config(TypedDict):
    """The part of the run's configuration in the manifest that is read without the dataclasses of the configuration."""

    model: dict[str, bool | Integer | float | str | None]
    data: Data
    run: Named
    steps: Size
    seed: Count
    task: NotRequired[Task]
    precision: NotRequired[dict[str, Any]]
    optimizer: NotRequired[Optimizer]
    checkpoint: NotRequired[Checkpoint]
    init_from: NotRequired[str | None]


class Base(TypedDict):
    checkpoint: str
    checksum: str


class Labels(TypedDict):
    names: list[str]
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None


class Tensor(TypedDict):
    shape: Annotated[list[Size], MinLen(1), MaxLen(4)]
    dim: Count
    parts: Size


class Fragment(TypedDict):
    name: str
    part: Count
    parts: Size
    start: Count
    count: Size
    kinds: list[str]


class File(TypedDict):
    bytes: Count
    crc32: str
    fragments: NotRequired[list[Fragment]]  # only in format 1; later formats have tables (`fragments.py`)


class Manifest(TypedDict):
    """The content of a manifest. Other keys are allowed, because later versions may add keys."""

    format: Literal[1, 2]
    clock: Clock
    updates: Count
    loss_scale: LossScale | None
    layout: Layout
    device: NotRequired[str]
    versions: dict[str, str]
    config: Config
    text: NotRequired[dict[str, Any]]
    base: NotRequired[Base | None]
    labels: NotRequired[Labels]
    tensors: dict[str, Tensor]
    files: dict[str, File]


class Damaged(UserError):
    """The error for a damaged checkpoint. `what` describes the damage in the message."""

    def __init__(self, folder: Path, what: str, way_out: str = "choose another checkpoint") -> None:
        super().__init__(f"{folder} is not a complete checkpoint: {what}; {way_out}")
        self.what = what


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest.

    Raises: Damaged if `folder` is not a training checkpoint or has a changed manifest, and UserError if a later version
    wrote it."""
    another = f"choose another checkpoint, or remove {MANIFEST} if the folder is not a training checkpoint"
    try:
        manifest = read_checked(folder / MANIFEST, LARGEST)
    except OSError as error:
        raise Damaged(folder, f"{MANIFEST} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Damaged(folder, f"{MANIFEST} cannot be read ({error})", another) from error
    number = manifest.get("format")
    if type(number) is int and number > FORMAT:
        raise UserError(
            f"{folder} has format {number}, and this version reads formats up to {FORMAT}: choose another checkpoint, "
            "or use the version that wrote it"
        )
    if type(number) is not int or number < 1:
        raise Damaged(folder, f"{MANIFEST} has no format", another)
    wrong = _wrong(manifest)
    if wrong is not None:
        raise Damaged(folder, f"{MANIFEST} was changed after it was written ({wrong})")
    return manifest


def _wrong(manifest: dict[str, Any]) -> str | None:
    """A message about the first value of the manifest with the wrong type, or None if all types are right."""
    from pydantic import ValidationError

    if is_deep({key: value for key, value in manifest.items() if key not in ("tensors", "files")}):
        return "its values are nested too deeply"
    try:
        _types().validate_python(manifest, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if bool(manifest.get("base")) != (manifest["config"].get("task", {}).get("lora", {}).get("rank", 0) > 0):
        return "base and config.task.lora contradict each other"
    for name, written in manifest["files"].items():
        if not _is_inside(name):
            return f"{name!r} is not a file in the folder"
        if manifest["format"] == 1 and "fragments" not in written:
            return f"files.{name} has no fragments"
    return None


@functools.cache
def _types() -> Any:
    """The type adapter of manifests. pydantic is imported in this function, because its import is slow."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and ".." not in path.parts and path.parts != ()


def file_in(folder: Path, name: str) -> Path:
    """The path of a checkpoint's file.

    Raises: Damaged if the file is missing, is not a regular file, or is a link to outside the folder."""
    path = folder / name
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
        regular = inside and stat.S_ISREG(path.stat().st_mode)
    except (OSError, RuntimeError) as error:  # a circle of links raises a RuntimeError
        raise Damaged(folder, f"{name} is missing") from error
    if not regular:
        raise Damaged(folder, f"{name} is not a regular file in the folder")
    return path


def wrong_size(folder: Path, name: str, written: dict[str, Any]) -> str | None:
    """An error message if a checkpoint's file is missing or has the wrong size, else None.

    `written` is the file's entry in the manifest."""
    try:
        size = file_in(folder, name).stat().st_size
    except Damaged as error:
        return error.what
    return None if size == written["bytes"] else f"{name} has another size than {MANIFEST} states"


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """The differences of two manifests (or sections), each as a row of `section.key`, old value and new value."""
    then, now = flat(before), flat(after)
    differing = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return [[key, str(then.get(key, "—")), str(now.get(key, "—"))] for key in differing]
