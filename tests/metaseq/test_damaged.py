"""Damaged, incomplete and hostile checkpoints of metaseq are one line, and no code of a pickle runs."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import python
from metaseq_forms import Size, flattened, metadata_of, part_of, weights_of, write

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.metaseq import pickled
from opt_parallel.metaseq.md5 import read_sums
from opt_parallel.metaseq.pickled import Inert, read_pickle
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.metaseq import odd_values

SIZE = Size()
SHARD = "checkpoint_last-model_part-{}-shard{}.pt"


def _change(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load a file that this test wrote, change its content, and write it again."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def _truncate(folder: Path) -> None:
    path = folder / SHARD.format(1, 1)
    path.write_bytes(path.read_bytes()[:-2000])


def _link_to_itself(folder: Path) -> None:
    path = folder / SHARD.format(1, 1)
    path.unlink()
    path.symlink_to(path.name)


def _cut_short(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["flat_param_0"] = content["model"]["flat_param_0"][:-5].clone()

    _change(folder / SHARD.format(1, 1), change)


def _all_short(folder: Path) -> None:
    for shard in range(3):
        path = folder / SHARD.format(1, shard)
        _change(path, lambda content: content["model"].update(flat_param_0=torch.zeros(5, dtype=torch.float16)))


def _other_run(folder: Path) -> None:
    _change(folder / SHARD.format(0, 2), lambda content: content["optimizer_history"][-1].update(num_updates=8))


def _other_network(folder: Path) -> None:
    write("raw", folder / "other", Size(heads=4), weights_of(SIZE), 2, 3)
    os.replace(folder / "other" / SHARD.format(1, 0), folder / SHARD.format(1, 0))


def _compressed(folder: Path) -> None:
    path = folder / SHARD.format(0, 0)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def _legacy(folder: Path) -> None:
    path = folder / SHARD.format(0, 0)
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda folder: (folder / SHARD.format(1, 1)).unlink(), r"part-1-shard1.pt is missing"),
    "two shards missing": (lambda folder: [(folder / SHARD.format(part, 1)).unlink() for part in range(2)],
                           r"part-0-shard1.pt and 1 more are missing"),
    "last shards missing": (lambda folder: [(folder / SHARD.format(part, 2)).unlink() for part in range(2)],
                            "do not add up to it .they are cut for 3 shards."),
    "part missing": (lambda folder: [(folder / SHARD.format(1, shard)).unlink() for shard in range(3)],
                     "out_proj.weight is cut for 2 parts .* but the folder has 1"),
    "doubled by number": (lambda folder: shutil.copy(folder / SHARD.format(0, 1), folder / SHARD.format(0, "01")),
                          "have the same numbers"),
    "doubled by content": (lambda folder: shutil.copy(folder / SHARD.format(0, 1), folder / SHARD.format(1, 1)),
                           "part-1-shard1.pt is a copy of checkpoint_last-model_part-0-shard1.pt"),
    "link to itself": (_link_to_itself, r"part-1-shard1.pt cannot be read \(Too many levels .*\): remove the link"),
    "truncated": (_truncate, "part-1-shard1.pt is damaged, truncated"),
    "shorter": (_cut_short, "part-1-shard1.pt: flat_param_0 has"),
    "all shorter": (_all_short, "do not add up"),
    "another run": (_other_run, "part-0-shard2.pt does not belong .* num_updates is 8, not 7"),
    "another network": (_other_network, "part-1-shard0.pt does not belong .* decoder_attention_heads is 4, not 8"),
    "compressed": (_compressed, "a record is compressed"),
    "legacy": (_legacy, "format of torch before 1.6"),
    "empty": (lambda folder: (folder / SHARD.format(0, 0)).write_bytes(b""), "is empty"),
    "text": (lambda folder: (folder / SHARD.format(0, 0)).write_text("404: not found"), "not a checkpoint"),
    "two forms": (lambda folder: write("singleton", folder / "x", SIZE, weights_of(SIZE))
                  or os.replace(folder / "x/restored.pt", folder / "restored.pt"), "ambiguous.*several checkpoints"),
    "beside Hugging Face": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "ambiguous"),
}  # fmt: skip


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "raw"
    write("raw", folder, SIZE, weights_of(SIZE), 2, 3)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_odd_values_and_differing_copies_are_warned_of(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    assert odd_values(folder, None) == []

    def change(content: dict[str, Any]) -> None:
        # A layer has 4,368 elements in a part. Shard 1 has those from 1,456 on, and fc1.weight begins at 2,192.
        content["model"]["decoder.layers.1.flat_param_0"][750:768] = 5e4
        content["model"]["decoder.layers.1.flat_param_0"][800] = float("nan")

    _change(folder / SHARD.format(0, 1), change)
    wrong, large = odd_values(folder, None)
    assert wrong.endswith("has values that are not finite, in decoder.layers.1.fc1.weight (1)")
    assert "has values beyond 100, in decoder.layers.1.fc1.weight (18, up to 4.998e+04): " in large


def test_wrong_bytes_are_seen_without_a_list(raw: Path, tmp_path: Path) -> None:
    """torch stores a checksum of each record. Zeros are what a download leaves that was interrupted."""
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    name = SHARD.format(1, 1)
    content = bytearray((folder / name).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    (folder / name).write_bytes(content)
    line = odd_values(folder, None)[0]  # the others are about the values that are now zero
    assert re.search(rf"files with wrong bytes, .*: {name} \(data/\d\): copy them again", line)


def test_names_in_upper_case_are_read(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    listed = tmp_path / "sums"
    listed.write_text("".join(f"{hashlib.md5(path.read_bytes()).hexdigest()} {path.name}\n" for path in raw.iterdir()))
    for path in [*folder.iterdir()][::2]:
        path.rename(folder / path.name.upper())
    assert odd_values(folder, listed) == []
    (folder / SHARD.format(0, 0)).touch()
    (folder / SHARD.format(0, 0).upper()).touch()
    with pytest.raises(UserError, match="have the same numbers: remove one"):
        open_checkpoint(folder)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    write("arrays", tmp_path / "arrays", SIZE, weights_of(SIZE))
    (tmp_path / "arrays/decoder.layers.1.fc1.weight").unlink()
    with pytest.raises(UserError, match=r"decoder.layers.1.fc1.weight is missing"):
        open_checkpoint(tmp_path / "arrays")
    with pytest.raises(UserError, match="is a file: name the folder that contains the checkpoint"):
        open_checkpoint(tmp_path / "arrays/decoder.layers.0.fc1.weight")


def test_the_copies_of_part_0_are_used(tmp_path: Path) -> None:
    write("stale", tmp_path / "parts", SIZE, weights_of(SIZE), 2)
    name = "decoder.layers.0.fc2.bias"
    _change(tmp_path / "parts/reshard-model_part-1.pt", lambda content: content["model"][name].add_(0.25))
    (line,) = odd_values(tmp_path / "parts", None)
    assert "1 tensors of which the model parts have different copies, by up to 0.25" in line
    assert f"in {name}: the copies of part 0 are used" in line


def test_files_are_compared_with_a_list_of_md5_sums(raw: Path, tmp_path: Path) -> None:
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in raw.iterdir()}
    listed = tmp_path / "sums.csv"
    listed.write_text("filename,md5sum\n" + "".join(f"{name},{total}\n" for name, total in sums.items()))
    assert odd_values(raw, listed) == []
    name = SHARD.format(0, 1)
    listed.write_text("".join(f"{'0' * 32 if key == name else total}  {key}\n" for key, total in sums.items()))
    with pytest.raises(UserError, match=f"{name} has the MD5 sum {sums[name]}, but .* says 000"):
        odd_values(raw, listed)
    for line in ("MD5 ({}) = {}\n", "{1} *{0}\r\n", "C:\\data\\{},{}\n", '"{}": "{}", ', "{1}  /data/opt 175b/{0}\n"):
        listed.write_text("".join(line.format(key, total) for key, total in sums.items()))
        assert read_sums("", listed) == sums
    listed.write_text("".join(f"{total}  {name}\n" for total in (sums[name], "0" * 32)))
    with pytest.raises(UserError, match=rf"has two sums of {name}, {sums[name]} and 000.*: remove the wrong line"):
        read_sums("", listed)
    listed.write_text(f"{sums[name]}  {name}\n")
    with pytest.raises(UserError, match=r"lists other files, checkpoint_last-model_part-0-shard0.pt is not in it"):
        odd_values(raw, listed)
    with pytest.raises(UserError, match=r"--md5 .*none does not exist"):
        odd_values(raw, tmp_path / "none")


class _Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Acts:
    """An object whose class would act when its state is set."""

    def __setstate__(self, state: Any) -> None:
        raise SystemExit(state)

    def __getstate__(self) -> Any:
        return {"acted": True}


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    """The values of a checkpoint beside hostile objects are read, and the objects do nothing."""
    mark = tmp_path / "ran"
    hostile = [_Calls(os.system, f"touch {mark}"), _Calls(eval, f"open({str(mark)!r}, 'w')"), Acts(),
               _Calls(shutil.rmtree, tmp_path / "here")]  # fmt: skip
    (tmp_path / "here").mkdir()
    folder = tmp_path / "here" / "parts"
    write("fused", folder, SIZE, weights_of(SIZE))
    whole = part_of(weights_of(SIZE), 0, 1)
    content = {"cfg": hostile, "extra_state": hostile, "args": hostile[0], "model": {**whole, "evil": hostile[1]}}
    torch.save(content, folder / "reshard-model_part-0.pt")
    (folder / "config.json").write_text('{"model_type": "opt", "num_attention_heads": 8}')
    opened = open_checkpoint(folder)
    opened.check_language_model()
    assert not mark.exists()


def _nested() -> bytes:
    """A dict whose key is a tuple of 2⁶⁰ equal tuples, which takes forever to hash."""
    doubled = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    return b"\x80\x02})" + doubled + b"K\x01s."


def test_a_pickle_cannot_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_pickle(_nested()) == {}
    monkeypatch.setattr(pickled, "MOST_STEPS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 instructions"):
        read_pickle(b"\x80\x02" + b")0" * 600 + b"N.")
    with pytest.raises(ValueError, match="larger than its storage"):
        read_pickle(_tensor_of(10**9))


def _tensor_of(count: int) -> bytes:
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.HalfStorage, "0", "cpu", 4) if value == "here" else None

    call = _Calls(torch._utils._rebuild_tensor_v2, "here", 0, (count,), (1,), False, None)
    Pickler(stream, protocol=2).dump(call)
    return stream.getvalue()


def test_objects_of_absent_classes_keep_their_state() -> None:
    found = read_pickle(b"\x80\x02cabsent.module\nClass\n)\x81}X\x01\x00\x00\x00aK\x05sb.")
    assert isinstance(found, Inert)
    assert found.state == {"a": 5}


def test_a_claimed_size_is_not_believed(tmp_path: Path) -> None:
    """A record that is smaller than its storage is an error before anything is allocated."""
    state = flattened(part_of(weights_of(SIZE), 0, 1), False)
    folder = tmp_path / "one"
    folder.mkdir()
    path = folder / "reshard-model_part-0.pt"
    torch.save({"model": state, "shard_metadata": metadata_of(part_of(weights_of(SIZE), 0, 1))}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:100] if name.endswith("data/1") else content)
    with pytest.raises(UserError, match=r"the record of .* is missing or ends early"):
        open_checkpoint(folder)


def test_a_command_says_one_line(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(raw, folder)
    (folder / SHARD.format(1, 2)).unlink()
    done = python("scripts/export.py", "--checkpoint", str(folder), "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == f"error: {folder / SHARD.format(1, 2)} is missing: use a complete copy\n"
    assert not (tmp_path / "out").exists()
