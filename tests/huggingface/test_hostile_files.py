"""Files made to do harm: only regular files of the folder are read, and nothing takes long or much memory.

Each is refused in one line, by the same call that opens a checkpoint."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest
import torch
from hugging_face import logits_of, random_model, some_ids, write_h5, write_msgpack
from safetensors.torch import load_file, save_file

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.huggingface.config import read_config, read_labels
from opt_parallel.huggingface.weights import WeightFiles
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.foreign import file_in

CPU = torch.device("cpu")
SECONDS = 10.0  # each takes under 2 on an idle machine


def refused(folder: Path, *words: str) -> str:
    """Opening the folder as a language model says so in one line, soon, and all the words are in it."""
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder).model(ALONE, CPU)
    assert time.process_time() - began < SECONDS
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 2000
    assert all(word in line for word in words), line
    return line


model = functools.cache(random_model)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers writes it."""
    folder = tmp_path_factory.mktemp("original")
    model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "theirs"))


def config_with(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- which files are read


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["absolute", "relative", "through a folder", "chain"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str, how: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    target = outside / name
    if how == "relative":
        target = Path("..") / "outside" / name
    elif how == "through a folder":
        (folder / "within").symlink_to(outside)
        target = Path("within") / name
    elif how == "chain":
        (folder / "step").symlink_to(target)
        target = Path("step")
    (folder / name).symlink_to(target)
    refused(folder, str(folder / name), str(outside / name), "copy the file")


def test_a_link_within_the_folder_and_a_link_to_the_folder_are_followed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "kept")
    (folder / "model.safetensors").symlink_to("kept")
    (folder.parent / "link").symlink_to(folder)
    ours = open_checkpoint(folder.parent / "link").model(ALONE, CPU)
    torch.testing.assert_close(ours(some_ids()), logits_of(model()), rtol=0, atol=1e-5)  # fp32, another order


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["a pipe", "a folder", "a loop", "a dangling link", "a device"])
def test_what_is_not_a_file_is_not_waited_for(folder: Path, name: str, what: str) -> None:
    path = folder / name
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(name if what == "a loop" else "nowhere")
    refused(folder, str(path))


def in_hub_cache(folder: Path, cache: Path, shared: bool) -> Path:
    """The folder as the hub's cache has it: a snapshot of links to blobs, and those links to the ones that all
    repositories share."""
    repository = cache / "models--someone--theirs"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if shared:
            store = cache / "blobs" / f"{number:02x}" / f"{number:064x}"
            store.parent.mkdir(parents=True)
            path.rename(store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hub_is_read_and_its_links_elsewhere_are_not(folder: Path, shared: bool) -> None:
    snapshot = in_hub_cache(folder, folder.parent / "cache", shared)
    open_checkpoint(snapshot).model(ALONE, CPU)
    secret = folder.parent / "secret"
    secret.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    refused(snapshot, str(secret))
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(folder.parent / "elsewhere")
    blobs.symlink_to(folder.parent / "elsewhere")
    (snapshot / "config.json").unlink()
    (folder.parent / "elsewhere" / "a").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/a")
    refused(snapshot, "leads out of its folder")


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"])
@pytest.mark.parametrize(
    "named", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "x\0y", "n" * 5000, "link", 3, ["a"], None]
)
def test_an_index_names_files_beside_it(folder: Path, single: str, named: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder.parent / "secret").write_text("{}")
    (folder / "link").symlink_to("../secret")
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    refused(folder)


def test_a_name_that_is_not_there_is_nothing(folder: Path) -> None:
    assert file_in(folder, "other.json") is None
    assert file_in(folder / "config.json", "other.json") is None


# ---- config.json

HUGE: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**30}, {"ffn_dim": 10**18}, {"vocab_size": 10**18},
    {"max_position_embeddings": 10**15}, {"word_embed_proj_dim": 10**15}, {"hidden_size": 4 * 10**10},
    {"num_hidden_layers": 9_999},
]  # fmt: skip


@pytest.mark.parametrize("fields", HUGE, ids=str)
def test_a_huge_network_is_refused_before_any_work(folder: Path, fields: dict[str, Any]) -> None:
    config_with(folder, **fields)
    refused(folder, *fields)


@pytest.mark.parametrize("text", ["1e999", "NaN", "-Infinity"])
@pytest.mark.parametrize("name", ["init_std", "dropout", "layerdrop"])
def test_numbers_that_are_none(folder: Path, name: str, text: str) -> None:
    config_with(folder, **{name: "here"})
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"here"', text))
    refused(folder, name, "a number")


def test_labels_are_counted_before_they_are_made(folder: Path) -> None:
    config_with(folder, num_labels=10**12)
    with pytest.raises(UserError, match=r"num_labels=1000000000000"):
        read_labels(folder)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "9" * 10_000, '{"a": ' + "9" * 10_000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_deep_or_long(folder: Path, name: str, content: str) -> None:
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(content)
    refused(folder, name)


def test_a_file_that_is_larger_than_any_of_its_kind(folder: Path) -> None:
    with open(folder / "config.json", "wb") as file:
        file.truncate(10**12)  # takes no room
    refused(folder, "config.json", "larger")


def test_a_key_with_a_line_break_is_one_line(folder: Path) -> None:
    config_with(folder, **{"a\nerror: all is well": 1, "b" * 10**6: 1})
    refused(folder, "may change the network")
    config_with(folder, architectures=5)


def test_what_fine_tuners_leave_is_said_once(folder: Path, capsys: Any) -> None:
    expected = read_config(folder)
    config_with(folder, end_token_id=2, unsloth_version="2024.9", gradient_checkpointing=False)
    assert [read_config(folder) for _ in range(2)] == [expected, expected]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert all(name in said for name in ("note: ", "end_token_id", "unsloth_version", "gradient_checkpointing"))


# ---- safetensors

Header = dict[str, Any]


def write_safetensors(folder: Path, header: Header | bytes, body: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if length is None else length) + text + body
    (folder / "model.safetensors").write_bytes(data)


def of(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


SAFETENSORS: dict[str, tuple[Any, bytes, int | None]] = {
    "a length beyond the file": ({}, b"", 2**40),
    "a length beyond all numbers": ({}, b"", 2**64 - 1),
    "a shape beyond the file": ({"a": of([10**18], 0, 4)}, b"abcd", None),
    "a shape that overflows": ({"a": of([2**62, 4], 0, 0)}, b"", None),
    "nothing, hugely": ({"a": of([0, 10**18], 0, 0)}, b"", None),
    "overlapping": ({"a": of([1], 0, 4), "b": of([1], 0, 4)}, b"abcd", None),
    "a hole": ({"a": of([1], 0, 4), "b": of([1], 8, 12)}, b"a" * 12, None),
    "deep": (b'{"a":' + b"[" * 90_000, b"", None),
    "a million dims": ({"a": of([1] * 1_000_000, 0, 4)}, b"abcd", None),
    "a name of megabytes": ({"a" * 4_000_000: of([1], 0, 4)}, b"abcd", None),
    "a name of two lines": ({"a\nerror: b": of([1], 0, 4)}, b"abcd", None),
    "negative": ({"a": of([-1], 0, 4)}, b"abcd", None),
}


@pytest.mark.parametrize("what", SAFETENSORS)
def test_a_lying_header(folder: Path, what: str) -> None:
    header, body, length = SAFETENSORS[what]
    write_safetensors(folder, header, body, length)
    refused(folder)


def test_a_tensor_stands_once(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.0.fc1.bias"
    save_file({**tensors, name.removeprefix("model."): tensors[name].clone()}, folder / "model.safetensors")
    refused(folder, name, "twice")
    (folder / "model.safetensors").unlink()
    for part in ("a", "b"):
        save_file(tensors, folder / part)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a", "y": "b"}}')
    refused(folder, "is also in another file")


def test_a_head_of_another_width(folder: Path) -> None:
    """Equal values are equal in whatever width they are stored; a value off by one step is not."""
    embedding, head = "model.decoder.embed_tokens.weight", "lm_head.weight"
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    for width in (torch.float32, torch.float64, torch.float16):
        save_file({**halves, head: halves[embedding].clone().to(width)}, folder / "model.safetensors")
        open_checkpoint(folder).model(ALONE, CPU)
    other = halves[embedding].float()
    other[3, 3] = torch.nextafter(other[3, 3], torch.tensor(99.0))  # which fp16 would not tell
    save_file({**halves, head: other}, folder / "model.safetensors")
    refused(folder, "a separate output projection")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_pointer_of_git_lfs(folder: Path, name: str) -> None:
    """What a clone without git-lfs has instead of the file."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(folder, f"{name} is a pointer of Git LFS, not the file: fetch it with git lfs pull")


# ---- PyTorch's pickles


def as_torch(folder: Path, zipped: bool = True) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(model().state_dict(), path, _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink(missing_ok=True)
    return path


def rezipped(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def with_pickle(path: Path, pickled: bytes) -> None:
    rezipped(path, lambda name, content: pickled if name.endswith("data.pkl") else content)


def nested_key(levels: int) -> bytes:
    """A dict whose key is a tuple of two of a tuple of two …: its hash takes 2^levels steps."""
    pairs = b"".join(b"h\x00h\x00\x86q\x00" for _ in range(levels))
    return b"\x80\x02}(" + b")q\x00" + pairs + b"K\x01u."


def of_size(size: tuple[int, ...], stride: tuple[int, ...], count: int = 1, zipped: bool = True) -> bytes:
    """A pickle of one tensor that says so of itself."""

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Stored(), 0, size, stride, False, {})

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(thing, Stored) else None

    into = io.BytesIO()
    Pickler(into, protocol=2).dump({"a": Tensor()})
    return into.getvalue()


PICKLES = {
    "a key that is hashed for ever": nested_key(64),
    "lists without end": b"\x80\x02" + b"]" * 2 * 10**5 + b".",
    "10¹² bytes of nothing": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\n\x8a\x06"
    + b"\0" * 5
    + b"\x01\x85Rs.",
    "a set": b"\x80\x02c__builtin__\nset\n](K\x01e\x85R.",
    "a string of 4 GB": b"\x80\x02X\xff\xff\xff\xff",
    "a number of digits": b"\x80\x02L" + b"9" * 10**6 + b"L\n.",
    "a tensor of one value, spread": of_size((10**9, 10**9), (0, 0)),
    "a tensor beyond its storage": of_size((10**12,), (1,)),
    "a tensor that begins before it": of_size((1,), (-1,)),
    "a storage beyond its record": of_size((10**12,), (1,), 10**12),
    "nothing": b"",
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_swells(folder: Path, what: str) -> None:
    with_pickle(as_torch(folder), PICKLES[what])
    refused(folder, "pytorch_model.bin")


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_swells_as_before_torch_1_6(folder: Path, what: str) -> None:
    path = as_torch(folder, zipped=False)
    start = io.BytesIO(path.read_bytes())
    for _ in range(3):
        pickle.load(start)
    path.write_bytes(start.getvalue()[: start.tell()] + PICKLES[what] + pickle.dumps(["0"], 2) + b"\0" * 12)
    refused(folder, "pytorch_model.bin")


def test_a_zip_that_swells(folder: Path) -> None:
    path = as_torch(folder)
    rezipped(path, lambda name, content: b"\0" * 10**8 if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**7
    refused(folder, "pytorch_model.bin", "compressed")


def test_a_zip_of_records_that_overlap(folder: Path) -> None:
    """Each entry of its directory leads to the same bytes."""
    path = as_torch(folder)
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.infolist()[0]
        for number in range(200):
            copy = zipfile.ZipInfo(f"archive/data/{number + 1000}")
            copy.header_offset, copy.CRC, copy.file_size, copy.compress_size = first.header_offset, 0, 10**6, 10**6
            archive.filelist.append(copy)
            archive._didModify = True  # type: ignore[attr-defined]
    refused(folder, "pytorch_model.bin", "larger than the file")


# ---- HDF5


def as_h5(folder: Path, change: Callable[[Any, str, np.ndarray], None]) -> Path:
    """The same model, one dataset made by `change(file, its place, its values)`."""
    write_h5(model(), folder, "single")
    (folder / "model.safetensors").unlink(missing_ok=True)
    with h5py.File(folder / "tf_model.h5", "a") as file:
        place = next(place for place in _places(file) if place.endswith("fc1/kernel:0"))
        values = file[place][()]
        del file[place]
        change(file, place, values)
    return folder / "tf_model.h5"


def _places(file: Any) -> list[str]:
    places: list[str] = []
    file.visititems(lambda place, found: places.append(place) if isinstance(found, h5py.Dataset) else None)
    return places


def test_h5_that_takes_values_from_elsewhere(folder: Path) -> None:
    secret = folder.parent / "secret"

    def external(file: Any, place: str, values: np.ndarray) -> None:
        secret.write_bytes(values.tobytes())
        file.create_dataset(place, values.shape, values.dtype, external=[(str(secret), 0, values.nbytes)])

    def virtual(file: Any, place: str, values: np.ndarray) -> None:
        with h5py.File(folder.parent / "other.h5", "w") as other:
            other["x"] = values
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = h5py.VirtualSource(folder.parent / "other.h5", "x", values.shape)
        file.create_virtual_dataset(place, layout)

    def linked(file: Any, place: str, values: np.ndarray) -> None:
        with h5py.File(folder.parent / "other.h5", "w") as other:
            other["x"] = values
        file[place] = h5py.ExternalLink(str(folder.parent / "other.h5"), "x")

    def soft(file: Any, place: str, values: np.ndarray) -> None:
        file["x"] = values
        file[place] = h5py.SoftLink("/x")

    for change in (external, virtual, linked, soft):
        as_h5(folder, change)
        refused(folder, "tf_model.h5", "fc1/kernel")


def test_h5_that_swells(folder: Path) -> None:
    shapes: list[dict[str, Any]] = [
        {"shape": (10**9, 10**9), "dtype": "f4", "chunks": (1000, 1000), "compression": "gzip"},
        {"shape": (48, 96), "dtype": "f4", "chunks": (48, 96), "compression": "gzip", "data": np.zeros((48, 96))},
        {"shape": (48, 96), "dtype": "f4", "chunks": (1, 1)},
        {"shape": (48, 96), "dtype": "f4", "maxshape": (None, None)},
        {"shape": (10**8, 10**8), "dtype": "f4"},  # never written: values of zero
        {"shape": (48, 96), "dtype": h5py.string_dtype()},
        {"shape": (48, 96), "dtype": [("a", "f4")]},
        {"shape": (48, 96), "dtype": ">f4", "data": np.zeros((48, 96), ">f4")},
    ]
    for arguments in shapes:
        as_h5(folder, lambda file, place, _, arguments=arguments: file.create_dataset(place, **arguments))
        refused(folder, "tf_model.h5", "fc1/kernel")


def test_h5_and_its_index_inside_the_folder(folder: Path) -> None:
    write_h5(model(), folder, "split")
    (folder / "model.safetensors").unlink()
    first = sorted(folder.glob("tf_model-*.h5"))[0]
    first.rename(folder.parent / first.name)
    first.symlink_to(folder.parent / first.name)
    refused(folder, first.name, "leads out of its folder")


# ---- MessagePack


def array(shape: Any, dtype: str, data: bytes) -> Any:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data), use_bin_type=True))


def chunked(shape: dict[str, int], *chunks: Any) -> dict[str, Any]:
    numbered = {str(number): chunk for number, chunk in enumerate(chunks)}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": numbered}


FLAX: dict[str, Any] = {
    "a list that says it has 4 · 10⁹": b"\xdd\xff\xff\xff\xff" + b"\x01" * 100,
    "a map that says it has 4 · 10⁹": b"\xdf\xff\xff\xff\xff" + b"\x01" * 100,
    "millions of numbers": b"\x81\xa1a\xdd" + struct.pack(">I", 5_000_000) + b"\x01" * 5_000_000,
    "a deep list": b"\x91" * 200_000 + b"\x01",
    "a deep map": b"\x81\xa1a" * 200_000 + b"\x01",
    "bytes beyond the file": b"\xc6\xff\xff\xff\xff",
    "an array of objects": {"a": array((1,), "O", b"\0" * 8)},
    "an array of records": {"a": array((1,), "(1000000,1000000)f4", b"\0" * 8)},
    "a huge shape": {"a": array((10**9, 10**9), "float32", b"\0" * 4)},
    "a negative shape": {"a": array((-2, -2), "float32", b"\0" * 16)},
    "a shape of text": {"a": array(("a",), "float32", b"\0" * 4)},
    "chunks of two dtypes": {
        "a": chunked({"0": 4}, array((2,), "float32", b"\0" * 8), array((2,), "float16", b"\0" * 4))
    },
    "chunks of less": {"a": chunked({"0": 10**15}, array((2,), "float32", b"\0" * 8))},
    "an array twice": {"x": {"kernel": array((1,), "float32", b"\0" * 4), "weight": array((1,), "float32", b"\0" * 4)}},
    "keys that are numbers": {1: array((1,), "float32", b"\0" * 4)},
}


@pytest.mark.parametrize("what", FLAX)
def test_a_tree_that_swells(folder: Path, what: str) -> None:
    (folder / "model.safetensors").unlink()
    content = FLAX[what] if isinstance(FLAX[what], bytes) else msgpack.packb(FLAX[what], strict_types=False)
    (folder / "flax_model.msgpack").write_bytes(content)
    refused(folder, "flax_model.msgpack")


@pytest.mark.parametrize("changes", [20, pytest.param(100, marks=pytest.mark.long)])
def test_random_damage_is_a_line_or_nothing(tmp_path: Path, changes: int) -> None:
    """Seeded changes of single bytes in each format: opened, or refused in one line."""
    model().save_pretrained(tmp_path / "st")
    write_h5(model(), tmp_path / "h5", "single")
    write_msgpack(model(), tmp_path / "msgpack", "single")
    for form, zipped in (("zip", True), ("old", False)):
        (tmp_path / form).mkdir()
        torch.save(model().state_dict(), tmp_path / form / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    generator, lines = np.random.default_rng(0), []
    for folder in sorted(tmp_path.iterdir()):
        path = max(folder.iterdir(), key=lambda file: file.stat().st_size)
        whole = path.read_bytes()
        for _ in range(changes):
            changed = bytearray(whole)
            ends = (int(generator.integers(20_000)), len(whole) - 1 - int(generator.integers(8_000)))
            changed[ends[int(generator.integers(2))]] = int(generator.integers(256))
            path.write_bytes(changed)
            try:
                files = WeightFiles(folder)
                for name, shape in files.shapes.items():
                    files.read(name, tuple(slice(0, min(size, 2)) for size in shape))
            except UserError as error:
                lines.append(str(error))
    assert lines
    assert all(line.isprintable() for line in lines)
