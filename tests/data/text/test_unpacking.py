"""Compressed files of every format give all that went in, or an error that names them: never less."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from opt_parallel.data.text import unpacking
from opt_parallel.data.text.unpacking import BGZF_END, DAMAGES, check_complete, ending_of, opened
from opt_parallel.runtime.errors import UserError

TEXT = b"".join(b'{"text": "row %d of some words"}\n' % number for number in range(40))
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda text: zstandard.ZstdCompressor(write_checksum=True).compress(text),
}


def read(path: Path) -> bytes:
    with opened(path) as file:
        return file.read()


@pytest.mark.parametrize("ending", PACKERS)
def test_every_member_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    for parts in ([TEXT], [TEXT, TEXT], [b"", TEXT, b"", TEXT[:100], TEXT[100:]]):
        path.write_bytes(b"".join(map(PACKERS[ending], parts)))
        assert read(path) == b"".join(parts)


@pytest.mark.parametrize("ending", PACKERS)
def test_a_cut_anywhere_is_an_error(tmp_path: Path, ending: str) -> None:
    """Between two members too, but for the place at which the file is a whole one of a member less."""
    path, member = tmp_path / f"a.jsonl{ending}", PACKERS[ending](TEXT)
    for cut in range(2 * len(member)):
        path.write_bytes((member * 2)[:cut])
        if cut == len(member):
            assert read(path) == TEXT
            continue
        with pytest.raises(DAMAGES):
            read(path)


@pytest.mark.parametrize("ending", PACKERS)
def test_damage_anywhere_is_an_error(tmp_path: Path, ending: str) -> None:
    path, whole, random_bits = tmp_path / f"a.jsonl{ending}", PACKERS[ending](TEXT) * 2, random.Random(1)
    for _ in range(60):
        damaged, bit = bytearray(whole), random_bits.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(DAMAGES):
            assert read(path) == TEXT * 2  # a bit that says nothing, as of gzip's time
    for rubbish in (b"rubbish behind it", b"\0" * 100):
        path.write_bytes(whole + rubbish)
        with pytest.raises(DAMAGES):
            read(path)


def test_what_is_said_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.bz2"
    path.write_bytes(bz2.compress(TEXT)[:-5])
    with pytest.raises(UserError, match=r"^key: it is not a complete .bz2 file \(the file ends early\): replace it"):
        check_complete(path, "key: it")


def bgzf(*blocks: bytes) -> bytes:
    """As bgzip writes: a member for each block, whose header tells its size."""
    packed = b""
    for block in blocks:
        stream = zlib.compressobj(wbits=-15)
        body = stream.compress(block) + stream.flush()
        head = bytes.fromhex("1f8b08040000000000ff0600424302" + "00") + struct.pack("<H", len(body) + 25)
        packed += head + body + struct.pack("<II", zlib.crc32(block), len(block))
    return packed


def test_a_cut_between_the_blocks_of_bgzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(bgzf(TEXT, TEXT) + BGZF_END)
    assert read(path) == TEXT * 2
    for left in (bgzf(TEXT, TEXT), bgzf(TEXT), b""):
        path.write_bytes(left)
        with pytest.raises(DAMAGES):
            read(path)


@pytest.mark.parametrize("ending", PACKERS)
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ALWAYS_ALLOWED", 1 << 20)
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACKERS[ending](bytes(1 << 24)))
    with pytest.raises(UserError, match=r"^key: it unpacks to over 200 times its size, .*: leave the file out"):
        check_complete(path, "key: it")
    path.write_bytes(PACKERS[ending](bytes(1 << 19)))  # small ones may be anything
    assert read(path) == bytes(1 << 19)


def test_a_window_too_large_for_the_memory(tmp_path: Path) -> None:
    path, packed = tmp_path / "a.txt.zst", io.BytesIO()
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=False)
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(packed, closefd=False) as writer:
        writer.write(TEXT)
    path.write_bytes(packed.getvalue())
    with pytest.raises(DAMAGES, match="memory"):
        read(path)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("A.JSONL.GZ", (".jsonl", ".gz")),
        ("a.b.Txt.zst", (".txt", ".zst")),
        ("a.gz", ("", ".gz")),
        ("a.tar.xz", (".tar", ".xz")),
        ("a.jsonl~", (".jsonl~", "")),
        ("a", ("", "")),
    ],
)
def test_endings(name: str, ending: tuple[str, str]) -> None:
    assert ending_of(Path(name)) == ending
