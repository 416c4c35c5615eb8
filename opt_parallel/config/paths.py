"""Names of files and folders as users give them: of this machine, with `~` for a home, never a URL."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from opt_parallel.runtime.errors import UserError

# any scheme with two slashes, and those that are written with one; a single letter is a name that ends in a colon
URL = re.compile(r"\s*([a-z][a-z0-9+.-]+://|(file|s3[an]?|gc?s|az|abfss?|adl|wasbs?|hdfs|dbfs|https?|hf):/)", re.I)
HUB_PAGE = re.compile(r"\s*https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)", re.I)
BREAKS = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's control characters, bytes that are no text, ends of lines and paragraphs

WAY_OUT = "change the permissions of the file and its folders, or choose another"

# metadata of a configuration's field that names files or folders: as a text, a list of texts, `{path: …}`, or a list of
# these. The tuple holds words that may stand there instead
PATH: dict[str, tuple[str, ...]] = {"path": ()}

Change = Callable[[str, str], str]  # of a path, given `key=` and its text


def typed_fields(section: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Dotted key, field and type of all that a section of a configuration and those within it hold."""
    hints = get_type_hints(section)
    for each in fields(section):
        if is_dataclass(hints[each.name]):
            yield from typed_fields(hints[each.name], f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", each, hints[each.name]


def path_keys(section: type, prefix: str = "") -> list[str]:
    """The keys of a section that name files or folders."""
    return [key for key, each, _ in typed_fields(section, prefix) if "path" in each.metadata]


def text_keys(section: type, prefix: str = "") -> list[str]:
    """The keys of a section whose value is a text, or null."""
    found = typed_fields(section, prefix)
    return [key for key, each, kind in found if "path" in each.metadata or kind in (str, str | None)]


def change_paths(values: dict[str, Any], section: type, change: Change, prefix: str = "") -> None:
    """Put `change(key=, path)` in place of every path among a section's plain values."""
    for key, each, _ in typed_fields(section):
        *outer, name = key.split(".")
        holder = values
        for part in outer:
            holder = holder.get(part, {})
        if "path" in each.metadata and name in holder:
            holder[name] = _changed(holder[name], partial(change, f"{prefix}{key}="), each.metadata["path"])


def _changed(value: Any, change: Callable[[str], str], words: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_changed(each, change, words) for each in value]
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _changed(value["path"], change, words)}
    return change(value) if isinstance(value, str) and value not in words else value


def local(key: str, name: str) -> str:
    """`name` with its `~` replaced. `key`: what it was set by, as `run.dir=`.

    Raises: UserError for a URL, for characters that no name should hold, and for a home that is not known."""
    refuse_breaks(key, name)
    if not name.strip():
        raise UserError(f"{key} is empty: name a file or folder, such as ./data")
    if page := HUB_PAGE.match(name):
        raise UserError(f"{key}{name} is a URL: write {key}{page[1]}, the hub's name for it, or copy it here first")
    if URL.match(name):
        raise UserError(
            f"{key}{name} is a URL, and only files and folders of this machine are read and written: mount it, or copy "
            "it to or from a folder here"
        )
    whole = os.path.expanduser(name)
    if whole.startswith("~") and not os.path.lexists(whole):
        raise UserError(f"{key}{name}: this machine knows no such home: write the path from /, or ./{name}")
    return whole


def refuse_breaks(key: str, text: str) -> None:
    """Raise UserError for a line break, another control character, or bytes that are no UTF-8."""
    if any(unicodedata.category(character) in BREAKS for character in text):
        raise UserError(
            f"{key}{text!r} holds a line break, another control character or bytes that are not UTF-8: choose another"
        )


def reach(key: str, name: str | Path) -> Path | None:
    """The file or folder `name`, None where there is none. `key` as for `local`, whose errors it raises.

    Raises: UserError where it cannot be reached or read."""
    path = Path(local(key, str(name)))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            os.scandir(path).close()
            os.stat(f"{path}/.")  # its names are of no use where none of them can be opened
        elif stat.S_ISREG(mode):
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{key}{name} cannot be read ({error.strerror}): {WAY_OUT}") from error
    return path


def make_folder(key: str, folder: Path) -> None:
    """Make a folder, unless it is there. `key` as for `local`. Raises: UserError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{key}{folder} cannot be written ({error.strerror}): choose another folder") from error


def absolute(_: str, name: str) -> str:
    """`name` from / on where it names files here, so that it is still theirs elsewhere; a hub id stays as it is."""
    if os.path.exists(name):
        return str(Path(name).absolute())
    if glob.has_magic(name) and not os.path.isabs(name):
        return os.path.join(glob.escape(os.getcwd()), name)
    return name
