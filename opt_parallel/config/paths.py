"""Check paths that users give. A path must be local and may start with `~`. URLs are refused."""

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

# URLs of any scheme with two slashes, and of some schemes with one slash
URL = re.compile(r"\s*([a-z][a-z0-9+.-]+://|(file|s3[an]?|gc?s|az|abfss?|adl|wasbs?|hdfs|dbfs|https?|hf):/)", re.I)
HUB_PAGE = re.compile(r"\s*https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)", re.I)
# Unicode categories: control characters, surrogates (undecodable bytes), line and paragraph separators
BREAKS = {"Cc", "Cs", "Zl", "Zp"}

WAY_OUT = "change the permissions of the file and its folders, or choose another path"

# Metadata of a configuration field that holds paths, as a text, a list of texts, `{path: …}`, or a list of these. The
# tuple lists values that are not paths, such as auto.
PATH: dict[str, tuple[str, ...]] = {"path": ()}

Change = Callable[[str, str], str]  # a function from (`key=`, path) to the new path


def typed_fields(section: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """The dotted key, the field and the type of every field of a section and its subsections."""
    hints = get_type_hints(section)
    for each in fields(section):
        if is_dataclass(hints[each.name]):
            yield from typed_fields(hints[each.name], f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", each, hints[each.name]


def text_keys(section: type, prefix: str = "") -> list[str]:
    """The dotted keys of a section whose value is a text or null."""
    found = typed_fields(section, prefix)
    return [key for key, each, kind in found if "path" in each.metadata or kind in (str, str | None)]


def change_paths(values: dict[str, Any], section: type, change: Change, prefix: str = "") -> None:
    """Replace every path in the values of a section by `change("key=", path)`."""
    for key, each, _ in typed_fields(section):
        *outer, name = key.split(".")
        holder = values
        for part in outer:
            holder = holder.get(part, {})
        if "path" in each.metadata and name in holder:
            holder[name] = _changed(holder[name], partial(change, f"{prefix}{key}="), each.metadata["path"])


def _changed(value: Any, change: Callable[[str], str], keywords: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_changed(each, change, keywords) for each in value]
    if isinstance(value, dict) and "path" in value:
        named = {key: _changed(value[key], change, keywords) for key in ("path", "ids_of") if key in value}
        return {**value, **named}
    return change(value) if isinstance(value, str) and value not in keywords else value


def local(key: str, name: str) -> str:
    """The path `name` with `~` expanded. `key` is the key or option that set the path, such as `run.dir=`, for
    messages.

    Raises: UserError for an empty name, a URL, control characters, or an unknown home folder."""
    refuse_breaks(key, name)
    if not name.strip():
        raise UserError(f"{key} is empty: name a file or folder, such as ./data")
    if page := HUB_PAGE.match(name):
        raise UserError(f"{key}{name} is a URL: write {key}{page[1]}, its id on the hub, or copy it here first")
    if URL.match(name):
        raise UserError(
            f"{key}{name} is a URL, and only files and folders of this host are read and written: mount it, or copy "
            "it to or from a folder here"
        )
    expanded = os.path.expanduser(name)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise UserError(f"{key}{name}: this host has no such home folder: write the path from /, or ./{name}")
    return expanded


def refuse_breaks(key: str, text: str) -> None:
    """Raise UserError if the text holds a line break, another control character, or bytes that are not UTF-8."""
    if any(unicodedata.category(character) in BREAKS for character in text):
        raise UserError(
            f"{key}{text!r} holds a line break, another control character or bytes that are not UTF-8: remove them"
        )


def reach(key: str, name: str | Path) -> Path | None:
    """The path of the file or folder `name`, or None if the path does not exist. `key`: see `local`.

    Raises: UserError as `local`, or if the file or folder cannot be read."""
    path = Path(local(key, str(name)))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            os.scandir(path).close()
            os.stat(f"{path}/.")  # this call fails without the permission to open the folder's files
        elif stat.S_ISREG(mode):
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        way_out = "remove the link, which leads to itself" if error.errno == errno.ELOOP else WAY_OUT
        raise UserError(f"{key}{name} cannot be read ({error.strerror}): {way_out}") from error
    return path


def make_folder(key: str, folder: Path) -> None:
    """Create a folder if it is missing. `key`: see `local`. Raises: UserError if the folder is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{key}{folder} cannot be written ({error.strerror}): choose another folder") from error


def absolute(_: str, name: str) -> str:
    """`name` as an absolute path if it exists or is a glob. Any other `name` is returned unchanged, since it may be a
    hub id."""
    if os.path.exists(name):
        return str(Path(name).absolute())
    if glob.has_magic(name) and not os.path.isabs(name):
        return os.path.join(glob.escape(os.getcwd()), name)
    return name
