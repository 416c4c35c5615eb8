"""Files of weights in every format: the same model out of each, slices alone are read, damage is one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import logits_of, random_model, some_ids, write_h5, write_msgpack

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.huggingface import weights as hf_files
from opt_parallel.huggingface.hub import WEIGHTS
from opt_parallel.huggingface.weights import WeightFiles
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError

CPU = torch.device("cpu")
PROJECTED = {"word_embed_proj_dim": 24}  # has every kind of tensor
TOLERANCE = 1e-5  # fp32 logits of order 10, the same values summed in another order


def close(folder: Path, expected: torch.Tensor) -> bool:
    ours = open_checkpoint(folder).model(ALONE, CPU)(some_ids())
    return torch.allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ["single", "split"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensorflow(tmp_path: Path, layout: str, dtype: str) -> None:
    model = random_model(PROJECTED).to(getattr(torch, dtype))
    write_h5(model, tmp_path, layout)
    assert close(tmp_path, logits_of(model.float()))


@pytest.mark.parametrize("layout", ["single", "split"])
@pytest.mark.parametrize(("dtype", "chunk"), [("float32", None), ("float32", 1000), ("bfloat16", None)])
def test_flax(tmp_path: Path, layout: str, dtype: str, chunk: int | None) -> None:
    model = random_model(PROJECTED).to(getattr(torch, dtype))
    write_msgpack(model, tmp_path, layout, chunk)
    assert close(tmp_path, logits_of(model.float()))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_torch(tmp_path: Path, split: bool, zipped: bool, monkeypatch: Any) -> None:
    """As transformers 4 wrote it, the tied head stored a second time; before torch 1.6 it was not a zip file.

    Mapped again and again, as a large file is."""
    monkeypatch.setattr(hf_files, "REMAP", 20_000)
    model = random_model(PROJECTED)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    assert "lm_head.weight" in state
    names = [f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number in range(len(state))]
    files = dict(zip(state, names, strict=True)) if split else dict.fromkeys(state, "pytorch_model.bin")
    for file in set(files.values()):
        held = {name: tensor for name, tensor in state.items() if files[name] == file}
        torch.save(held, tmp_path / file, _use_new_zipfile_serialization=zipped)
    if split:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert close(tmp_path, logits_of(model))


@pytest.mark.parametrize("form", ["safetensors", "torch", "h5", "msgpack", "chunks"])
def test_a_slice_is_that_slice(tmp_path: Path, form: str) -> None:
    model = random_model(PROJECTED)
    if form == "h5":
        write_h5(model, tmp_path, "single")
    elif form in ("msgpack", "chunks"):
        write_msgpack(model, tmp_path, "single", 700 if form == "chunks" else None)
    elif form == "torch":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path)
    files = WeightFiles(tmp_path)
    for name in ("decoder.layers.1.fc2.weight", "decoder.embed_tokens.weight"):
        whole = model.model.get_parameter(name)
        stored = name if name in files.shapes else f"model.{name}"
        assert files.shapes[stored] == tuple(whole.shape)
        ranges = slice(3, 17), slice(10, 24)
        assert torch.equal(files.read(stored, ranges), whole[ranges])


def test_safetensors_come_before_the_others(tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path)
    for other in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        (tmp_path / other).write_bytes(b"not looked at")
    assert close(tmp_path, logits_of(model))


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_does_nothing_but_hold_weights(tmp_path: Path, zipped: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    random_model().config.save_pretrained(tmp_path)
    weights = tmp_path / "pytorch_model.bin"
    torch.save({"a": Bomb()}, weights, _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "only weights are read from a pickle")
    weights.write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "only weights are read from a pickle")
    torch.save({"epoch": 3}, weights, _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "contains a dict, not a dict of tensors")
    assert not (tmp_path / "exploded").exists()


def refused(folder: Path, *words: str) -> None:
    """Opening says so in one line, and all the words are in it."""
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    assert all(word in line for word in words), line


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in each format, each in a folder of that name."""
    folder, model = tmp_path_factory.mktemp("written"), random_model()
    model.save_pretrained(folder / "safetensors")
    model.save_pretrained(folder / "split", max_shard_size="50KB")
    write_h5(model, folder / "h5", "single")
    write_msgpack(model, folder / "msgpack", "single")
    model.config.save_pretrained(folder / "torch")
    torch.save(model.state_dict(), folder / "torch" / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "h5", "msgpack", "torch"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_one_line(written: Path, tmp_path: Path, form: str, damage: str) -> None:
    folder = shutil.copytree(written / form, tmp_path / "copy")
    file = folder / WEIGHTS[["safetensors", "torch", "h5", "msgpack"].index(form)]
    content = {"cut": file.read_bytes()[:-1000], "empty": b"", "text": b"version https://git-lfs.example"}[damage]
    file.write_bytes(content)
    refused(folder, file.name, "complete copy")


def test_split_files_that_do_not_fit_their_index(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "split", tmp_path / "split")
    index = folder / "model.safetensors.index.json"
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    last.rename(folder / "elsewhere")
    refused(folder, last.name, "missing", index.name)
    for content in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"metadata": {}}'):
        index.write_text(content)
        refused(folder, index.name, "is not an index")
    for content in ({}, {"a": "../secret.safetensors"}):
        index.write_text(json.dumps({"weight_map": content}))
        refused(folder, index.name, "in its own folder")
    index.unlink()
    refused(folder, "contains no weights", "pytorch_model.bin")


def test_missing_package_is_one_line(written: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(written / "h5", "pip install 'opt-parallel[import]'")
