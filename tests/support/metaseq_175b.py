"""Writes the 992 files of OPT-175B with true headers and sparse contents, which take little space on a disk.

python tests/support/metaseq_175b.py FOLDER
"""

from __future__ import annotations

import io
import math
import pickle
import random
import struct
import sys
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from metaseq_forms import Size, around

SIZE = Size(layers=96, hidden=12288, heads=96, ffn=49152, rows=50272, positions=2048)
PARTS, SHARDS = 8, 124
ALIGNMENT = 64  # torch aligns the contents of records


@dataclass(frozen=True)
class _Storage:
    key: str
    count: int


class _Tensor:
    """Pickled as torch pickles a tensor of one dimension."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, (self.storage.count,), (1,), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", torch.HalfStorage, value.key, "cpu", value.count) if isinstance(value, _Storage) else None


def modules(size: Size, parts: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The names and shapes in each flat tensor of a model part, by the path of its module."""
    hidden, ffn = size.hidden, size.ffn
    layer = {
        "self_attn.qkv_proj.weight": (3 * hidden // parts, hidden), "self_attn.qkv_proj.bias": (3 * hidden // parts,),
        "self_attn.out_proj.weight": (hidden, hidden // parts), "self_attn.out_proj.bias": (hidden,),
        "self_attn_layer_norm.weight": (hidden,), "self_attn_layer_norm.bias": (hidden,),
        "fc1.weight": (ffn // parts, hidden), "fc1.bias": (ffn // parts,),
        "fc2.weight": (hidden, ffn // parts), "fc2.bias": (hidden,),
        "final_layer_norm.weight": (hidden,), "final_layer_norm.bias": (hidden,),
    }  # fmt: skip
    root = {
        "decoder.embed_tokens.weight": (size.rows // parts, hidden),
        "decoder.embed_positions.weight": (size.positions + 2, hidden),
        "decoder.layer_norm.weight": (hidden,), "decoder.layer_norm.bias": (hidden,),
    }  # fmt: skip
    return {"": root} | {f"decoder.layers.{number}": layer for number in range(size.layers)}


def write_sparse(folder: Path, size: Size = SIZE, parts: int = PARTS, shards: int = SHARDS) -> None:
    """Write a raw checkpoint whose values are holes of the files, read as zeros."""
    folder.mkdir(parents=True)
    numels = {path: [math.prod(shape) for shape in held.values()] for path, held in modules(size, parts).items()}
    entries = []
    for path, held in modules(size, parts).items():
        about = {"names": list(held), "shapes": [torch.Size(shape) for shape in held.values()],
                 "numels": numels[path], "padding": 0}  # fmt: skip
        entries.append({"fsdp_path": path, "params": {"flat_param_0": about}, "shared_param_info": []})
    counts = [-(-sum(each) // shards) for each in numels.values()]
    names = [f"{path}.flat_param_0" if path else "flat_param_0" for path in numels]
    drawn = random.Random(1)
    for part in range(parts):
        for shard in range(shards):
            state = {name: _Tensor(_Storage(str(k), n)) for k, (name, n) in enumerate(zip(names, counts, strict=True))}
            content = {**around(size, parts), "model": state,
                       "shard_metadata": {"param_metadata": entries, "buffer_names": ["decoder.version"]}}  # fmt: skip
            content["cfg"]["distributed_training"] = {"distributed_rank": part * shards + shard}
            stream = io.BytesIO()
            _Pickler(stream, protocol=2).dump(content)
            path = folder / f"checkpoint_last-model_part-{part}-shard{shard}.pt"
            _write_archive(path, stream.getvalue(), [2 * count for count in counts], drawn)


def _write_archive(path: Path, content: bytes, sizes: list[int], drawn: random.Random) -> None:
    """Write a zip archive with the pickle and records of `sizes` bytes, whose contents are not written."""
    records: list[tuple[str, int, bytes | None]] = [("data.pkl", len(content), content), ("byteorder", 6, b"little")]
    records += [(f"data/{number}", size, None) for number, size in enumerate(sizes)]
    listed = []
    with open(path, "wb") as file:
        for name, size, written in [*records, ("version", 2, b"3\n")]:
            start, full = file.tell(), f"{path.stem}/{name}".encode()
            padding = -(start + 30 + len(full) + 4) % ALIGNMENT
            crc = drawn.getrandbits(32) if written is None else zlib.crc32(written)
            fields = (0, 0, 0, 0, crc, size, size, len(full))
            file.write(b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 0, *fields, 4 + padding) + full)
            file.write(struct.pack("<HH", 0x4246, padding) + bytes(padding))
            file.write(written) if written is not None else file.seek(size, io.SEEK_CUR)
            listed.append(b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 0, 0, *fields, 0, 0, 0, 0, 0, start) + full)
        directory = file.tell()
        file.write(b"".join(listed))
        counts = (0, 0, len(listed), len(listed), file.tell() - directory, directory, 0)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", *counts))


if __name__ == "__main__":
    write_sparse(Path(sys.argv[1]))
