"""docs/checkpoint-format.md is right: the reader that it prints reads our checkpoints."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT
from layouts import TINY, Layout
from resumed_runs import go, run_of, with_tokenizer

from opt_parallel.checkpoint import reader as reshard
from opt_parallel.checkpoint.reader import CheckpointReader
from opt_parallel.runtime.errors import UserError

DOCUMENT = ROOT / "docs" / "checkpoint-format.md"
KINDS = ("weights", "exp_avg", "exp_avg_sq")


def documented_reader() -> Callable[..., np.ndarray]:
    code = DOCUMENT.read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names["read"]


def saved(crew: Any, folder: Path, layout: Layout, step: int) -> Path:
    """A checkpoint after `step` steps, of a network whose vocabulary does not divide."""
    assert TINY["vocab_size"] % 2
    crew(layout.world)(go, run_of(with_tokenizer(folder), layout, 6), 0, step, (step,))
    return folder / "checkpoints" / f"step-{step}"


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, stage=1, micro=2),
        Layout(data=2, stage=3, micro=2),
        pytest.param(Layout(tensor=2, data=2, stage=1, micro=2), marks=pytest.mark.long),
        pytest.param(Layout(tensor=2, data=2, stage=3, micro=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_documented_reader_reads_what_ours_reads(
    crew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    monkeypatch.setattr(reshard, "CHUNK", 1000)  # ours rearranges large tensors some rows at a time
    folder = saved(crew, tmp_path / "run", layout, step=2)
    read, ours = documented_reader(), CheckpointReader(folder)
    assert ours.shapes["decoder.embed_tokens.weight"] == (515, 64)
    for name, shape in ours.shapes.items():
        for kind in KINDS:
            whole = ours.read_tensor(kind, name)
            assert whole is not None
            assert whole.shape == shape
            np.testing.assert_array_equal(read(folder, name, kind), whole.numpy(), f"{kind}/{name}")
            assert bool(whole.any())


def test_the_document_names_every_key(crew: Any, tmp_path: Path) -> None:
    """And no moments stand for zero ones, as before the first step."""
    folder = saved(crew, tmp_path / "run", Layout(), step=0)
    manifest = json.loads((folder / "manifest.json").read_text())
    text = DOCUMENT.read_text()
    for key in (*manifest, *manifest["clock"], *manifest["layout"], "loss_scale", "bytes", "crc32"):
        assert f"`{key}`" in text, key
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        *manifest["files"], "manifest.json"
    }  # fmt: skip
    name, tensor = next(iter(manifest["tensors"].items()))
    assert CheckpointReader(folder).read_tensor("exp_avg", name) is None
    moment = documented_reader()(folder, name, "exp_avg")
    assert moment.shape == tuple(tensor["shape"])
    assert not moment.any()


def test_what_is_no_safetensors_file_is_not_read(crew: Any, tmp_path: Path) -> None:
    """A pickle in its place, which would run code if it were loaded; a file cut short; one of other tensors."""
    folder = saved(crew, tmp_path / "run", Layout(), step=0)
    path, name = folder / "rank-00000.safetensors", "decoder.final_layer_norm.weight"
    content = path.read_bytes()
    planted = pickle.dumps(Planted(str(tmp_path / "ran")))
    for wrong in (planted, content[:-4], content.replace(name.encode(), name[::-1].encode())):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"rank-00000\.safetensors cannot be read"):
            CheckpointReader(folder).read_tensor("weights", name)
    assert not (tmp_path / "ran").exists()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)
