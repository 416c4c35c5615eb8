"""Identifies a text by the content of its files, independently of the paths and times of the files.

The checksums are computed by reading the whole text once. `data.cache` stores the checksums by the path, size, time and
first and last bytes of each file. If files were moved or touched, they are read again, and the text is recognised by
its checksums. A stream is identified only by the sizes and the first and last bytes of its files, because training
starts before the whole stream is read. If a file of token ids is larger than 256 MiB, only 1,024 blocks of it are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from zlib import crc32

from filelock import FileLock

from opt_parallel.data.ids.documents import COMPLETE, PLACES
from opt_parallel.data.ids.formats import is_ids_or_index
from opt_parallel.data.store.cache import cached
from opt_parallel.data.store.workers import progress
from opt_parallel.data.text.sources import Corpus
from opt_parallel.data.text.unpacking import ending_of
from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.machine import cpus
from opt_parallel.storage.atomic import write_text
from opt_parallel.storage.checked import dump_checked, read_checked

LOOKED_INTO, ENDS = 200, 2**16  # Number of files whose first and last bytes are compared, and number of these bytes.
BLOCK, CHUNK = 2**26, 2**20  # Number of bytes that one task of a thread reads in total and at a time.
AT_ONCE = 4096  # Maximum number of blocks in the queue of the threads.
LARGEST = 2**30  # Maximum bytes of a file with checksums.


def content_of(cache: str, corpus: Corpus, stream: bool) -> tuple[str, ...]:
    """For each file, in the order of the corpus: its checksum, and the extension of its name.

    For a data set in a folder, the path within the folder replaces the extension. Raises: UserError if a file cannot be
    read."""
    files = [(path, "".join(ending_of(path))) for path in corpus.every_file]
    for folder in corpus.folders:
        files += [(path, str(path.relative_to(folder))) for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path, _ in files]
    try:
        ends = list(ends_of(paths))
        if stream:
            checksums = [f"{size} {checksum:08x}" for size, checksum in ends]
        else:
            checksums = _checksums(cache, corpus, paths, ends)
    except OSError as error:
        raise UserError(
            f"{corpus.key}: {error.filename} cannot be read ({error.strerror}): restore the file"
        ) from error
    return tuple(f"{checksum} {what}" for checksum, (_, what) in zip(checksums, files, strict=True))


def ends_of(paths: list[Path]) -> Iterator[tuple[int, int]]:
    """The size of each file, and a checksum of its first and last bytes. Raises: OSError.

    The checksum is 0 for files that do not belong to the compared sample of the files."""
    step = max(1, len(paths) // LOOKED_INTO)
    for number, path in enumerate(paths):
        size = path.stat().st_size
        if number % step:
            yield size, 0
            continue
        with path.open("rb") as file:
            first = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            yield size, crc32(first + file.read(ENDS))


def _checksums(cache: str, corpus: Corpus, paths: list[Path], ends: list[tuple[int, int]]) -> list[str]:
    """The checksum of each file, from the cache, or computed by one process while other processes wait."""
    times = [path.stat().st_mtime_ns for path in paths]
    known_by = [[str(path), time, *end] for path, time, end in zip(paths, times, ends, strict=True)]
    remembered = cached(cache, "checksums", known_by).with_suffix(".json")
    if (known := _remembered(remembered, len(paths))) is not None:
        return known
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{remembered}.lock")
        lock.acquire()
    except OSError:  # a complete cache may be read-only
        return _read(corpus, paths, ends)
    with lock:
        if (known := _remembered(remembered, len(paths))) is None:
            known = _read(corpus, paths, ends)
            write_text(remembered, dump_checked({"checksums": known}))
        return known


def _remembered(path: Path, number: int) -> list[str] | None:
    try:
        known = read_checked(path, LARGEST)["checksums"]
    except (OSError, ValueError, KeyError):
        return None
    return known if isinstance(known, list) and len(known) == number else None


def _read(corpus: Corpus, paths: list[Path], ends: list[tuple[int, int]]) -> list[str]:
    """The checksum of each file, which is the SHA-256 hash of the SHA-256 hashes of its blocks.

    Several threads can read the blocks of one file."""
    sizes = [size for size, _ in ends]
    places = [_places(path, size) for path, size in zip(paths, sizes, strict=True)]
    blocks = [(path, *place) for path, each in zip(paths, places, strict=True) for place in each]
    digests = _digests(blocks, f"{corpus.key}: reading", sum(min(length, BLOCK) for _, _, length in blocks))
    return [hashlib.sha256(b"".join(islice(digests, len(each)))).hexdigest() for each in places]


def _places(path: Path, size: int) -> list[tuple[int, int]]:
    """The parts of a file that its checksum covers, each as (first byte, number of bytes)."""
    if size <= COMPLETE or not is_ids_or_index(path):
        return [(start, BLOCK) for start in range(0, size, BLOCK)]
    return [(start, ENDS) for start in [*range(0, size - ENDS, size // PLACES), size - ENDS]]


def _digests(blocks: list[tuple[Path, int, int]], what: str, total: int) -> Iterator[bytes]:
    with progress(what, total) as report, ThreadPoolExecutor(cpus()) as pool:
        for first in range(0, len(blocks), AT_ONCE):
            for size, digest in pool.map(_digest, blocks[first : first + AT_ONCE]):
                report(size)
                yield digest


def _digest(block: tuple[Path, int, int]) -> tuple[int, bytes]:
    path, start, length = block
    digest, left = hashlib.sha256(), length
    with path.open("rb") as file:
        file.seek(start)
        while left and (read := file.read(min(left, CHUNK))):
            digest.update(read)
            left -= len(read)
    return length - left, digest.digest()
