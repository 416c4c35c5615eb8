"""What we export: transformers reads all of it and computes the same; it is whole or absent; memory is a tensor's."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import python, start
from exporting import VARIANTS, checkpoint, random_ids
from safetensors import safe_open
from torch import Tensor

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.config.units import bytes_of
from opt_parallel.huggingface.folder import checksum, write_folder
from opt_parallel.parallel.shard import Constant, Shard, fill
from opt_parallel.parallel.topology import ALONE
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export, is_of

VOCABULARY = 515  # of layouts.TINY: tensor rank 1 of 2 holds a row of padding


@pytest.fixture(scope="module")
def trained(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`trained(variant)`: a checkpoint, of 350m saved by four processes at tensor 2 × data 2 under ZeRO-3."""
    made: dict[str, Path] = {}

    def of_variant(variant: str) -> Path:
        if variant not in made:
            made[variant] = checkpoint(crew, tmp_path_factory.mktemp(variant), variant)
        return made[variant]

    return of_variant


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_transformers_agrees(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Our logits from `source`, its weights rounded to `dtype`, are transformers' from `folder`, both in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(theirs, OPTForCausalLM)
    assert not any(report.values()), report
    opened = open_checkpoint(source)
    ours = opened.model(ALONE, torch.device("cpu"))
    fill(ours, lambda name, shard: opened.weights(name, shard).to(dtype), torch.device("cpu"), torch.float32)
    ids = random_ids(VOCABULARY)
    with torch.no_grad():
        # fp32 logits of order 1, sums in another order
        torch.testing.assert_close(ours(ids), theirs.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder)("x").input_ids[0] == 2  # a prompt starts with </s>


SIZES = ("60KB", "5GB")
# Every variant is exported in one of the sizes, both in the long suite.
EXPORTS = [
    pytest.param(variant, size, marks=() if size == SIZES[number % 2] else pytest.mark.long)
    for number, variant in enumerate(VARIANTS)
    for size in SIZES
]


@pytest.mark.parametrize(("variant", "shard_size"), EXPORTS)
def test_transformers_computes_the_same(
    trained: Callable[[str], Path], tmp_path: Path, variant: str, shard_size: str
) -> None:
    source, output, limit = trained(variant), tmp_path / "export", bytes_of(shard_size, "")
    export(source, output, limit, ExportDtype.float32)
    assert_transformers_agrees(source, output, torch.float32)
    tensors, config = stored_tensors(output), open_checkpoint(source).config
    assert "lm_head.weight" not in tensors
    assert tensors["model.decoder.embed_tokens.weight"].shape == (VOCABULARY, config.embedding_size)
    assert sum(tensor.numel() for tensor in tensors.values()) == config.parameters()
    assert json.loads((output / "checksums.json").read_text()) == {
        name: checksum(tensor) for name, tensor in tensors.items()
    }
    files = sorted(path.name for path in output.glob("*.safetensors"))
    if shard_size == "5GB":
        assert files == ["model.safetensors"]
        assert not (output / "model.safetensors.index.json").exists()
        return
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * config.parameters()
    for name in files:
        sizes = [tensors[tensor].nbytes for tensor, file in index["weight_map"].items() if file == name]
        assert sum(sizes) <= limit or len(sizes) == 1  # a tensor over the limit has a file to itself


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["pre-norm", "350m"])
def test_half_precision(trained: Callable[[str], Path], tmp_path: Path, variant: str, dtype: str) -> None:
    source, output = trained(variant), tmp_path / "export"
    export(source, output, 10**9, ExportDtype(dtype))
    assert {tensor.dtype for tensor in stored_tensors(output).values()} == {getattr(torch, dtype)}
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == dtype
    assert_transformers_agrees(source, output, getattr(torch, dtype))


def test_an_export_exported_again_is_the_same(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """A Hugging Face folder is a checkpoint, too; the card that it brings stays."""
    first, second = tmp_path / "first", tmp_path / "second"
    export(trained("350m"), first, 10**9, ExportDtype.float32)
    (first / "README.md").write_text("Trained by somebody else.\n")
    export(first, second, 10**9, ExportDtype.float32)
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt"])
def test_no_file_from_outside_gets_into_an_export(trained: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """A link of a brought folder leads to something of this machine's."""
    theirs = tmp_path / "theirs"
    export(trained("pre-norm"), theirs, 10**9, ExportDtype.float32)
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    (theirs / name).unlink(missing_ok=True)
    (theirs / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} leads out of its folder"):
        export(theirs, tmp_path / "export", 10**9, ExportDtype.float32)
    (theirs / name).unlink()
    os.mkfifo(theirs / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        export(theirs, tmp_path / "export", 10**9, ExportDtype.float32)
    assert not (tmp_path / "export").exists()


def test_an_export_says_which_checkpoint_it_is_of(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """By step and checksum: whatever the files' times, and where they lie."""
    checkpoint, output = trained("pre-norm"), tmp_path / "export"
    export(checkpoint, output, 10**9, ExportDtype.float32)
    for path in (output, output / "config.json", output / "checkpoint.json"):
        os.utime(path, (0, 0))
    other = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    assert is_of(output, checkpoint)
    assert is_of(Path(shutil.copytree(output, tmp_path / "copy")), other)
    (other / "manifest.json").write_bytes((checkpoint / "manifest.json").read_bytes() + b"\n")
    assert not is_of(output, other)
    for content in (b"", b"{}", b"[" * 10**5, b"\xff", b'{"step": 2}'):
        (output / "checkpoint.json").write_bytes(content)
        assert not is_of(output, checkpoint)
    assert not is_of(tmp_path / "absent", checkpoint)


def test_two_exports_into_one_folder(
    trained: Callable[[str], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At once: one of them is there, whole, and the other says so."""
    output = tmp_path / "export"
    said = tmp_path_factory.mktemp("said")
    command = ["scripts/export.py", "--checkpoint", str(trained("pre-norm")), "--output", str(output)]
    both = [start(said / dtype, *command, "--dtype", dtype) for dtype in ("float32", "bfloat16")]
    assert all(process.ended_within(200) for process in both)
    statuses = [process.status for process in both]
    assert sorted(statuses) == [0, 2]
    (error,) = (said / ("float32", "bfloat16")[statuses.index(2)]).read_text().splitlines()
    assert f"{output} " in error
    assert "remove it or choose another folder" in error
    won = ("float32", "bfloat16")[statuses.index(0)]
    checksums = {name: checksum(tensor) for name, tensor in stored_tensors(output).items()}
    assert json.loads((output / "checksums.json").read_text()) == checksums
    assert {str(tensor.dtype) for tensor in stored_tensors(output).values()} == {f"torch.{won}"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_cannot_be_exported_is_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--output {tmp_path} exists"):
        export(trained("pre-norm"), tmp_path, 10**9, ExportDtype.float32)


def whole(*shape: int) -> Shard:
    return Shard(shape, 0, 0, 1, Constant(0.0), decay=False)


def write(output: Path, values: dict[str, Tensor], dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
    parameters = [(name, whole(*tensor.shape)) for name, tensor in values.items()]
    write_folder(output, {"model_type": "opt"}, parameters, lambda name, _: values[name], dtype, 10**9, **arguments)


def test_a_value_too_large_for_float16_is_an_error(tmp_path: Path) -> None:
    values = {"decoder.small": torch.tensor([65504.0, -65504.0]), "decoder.large": torch.tensor([1.0, -1e5])}
    with pytest.raises(UserError, match=r"model\.decoder\.large has values up to 1e\+05, but .* float16 is 6\.55e\+04"):
        write(tmp_path / "export", values, torch.float16)
    assert list(tmp_path.iterdir()) == []
    del values["decoder.large"]
    write(tmp_path / "export", values, torch.float16)


def test_values_that_are_not_finite_are_written_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"decoder.good": torch.ones(2), "decoder.bad": torch.tensor([1.0, float("nan")])}
    write(tmp_path / "export", values)
    warning = capsys.readouterr().out.splitlines()
    assert len(warning) == 1
    assert warning[0].startswith("warning: model.decoder.bad has values that are not finite")
    assert bool(stored_tensors(tmp_path / "export")["model.decoder.bad"][1].isnan())


def test_a_folder_that_is_replaced_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "export"
    write(output, {"decoder.old": torch.ones(2)})
    with pytest.raises(UserError):
        write(output, {"decoder.new": torch.tensor([1e5])}, torch.float16, replace=True)
    assert list(stored_tensors(output)) == ["model.decoder.old"]
    write(output, {"decoder.new": torch.ones(2)}, replace=True)
    assert list(stored_tensors(output)) == ["model.decoder.new"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600K", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(trained: Callable[[str], Path], small_disk: Path) -> None:
    output = small_disk / "export"
    command = ["scripts/export.py", "--checkpoint", str(trained("pre-norm")), "--output", str(output)]
    process = python(*command)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        f"error: {output} cannot be written (No space left on device), and its partial files were removed: free disk "
        "space, or choose another folder"
    ]
    assert list(small_disk.iterdir()) == []
    assert python(*command, "--dtype", "bfloat16").returncode == 0  # half the size fits


SLOW = """
import sys, time, torch
from pathlib import Path
from opt_parallel.huggingface.folder import write_folder
from opt_parallel.runtime.errors import reporting
from opt_parallel.parallel.shard import Constant, Shard

def source(name, shard):
    if name == "decoder.3":
        print("half of it is written", flush=True)
        time.sleep(100)
    return torch.ones(shard.shape)

parameters = [(f"decoder.{number}", Shard((1 << 20,), 0, 0, 1, Constant(0.0), False)) for number in range(6)]
with reporting():
    write_folder(Path(sys.argv[1]), {"model_type": "opt"}, parameters, source, torch.float32, 1 << 23)
"""
HALF = "half of it is written\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_mid_write(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, how: signal.Signals) -> None:
    output, aside = tmp_path / "export", tmp_path_factory.mktemp("aside")
    (aside / "slow.py").write_text(SLOW)
    process, said = start(aside / "said", str(aside / "slow.py"), str(output)), aside / "said"
    while not process.ended_within(0.02) and said.read_text() != HALF:
        pass
    os.kill(process.pid, how)
    assert process.ended_within(240)
    assert not output.exists()
    if how is signal.SIGINT:
        assert (process.status, said.read_text()) == (130, f"{HALF}error: interrupted\n")
        assert list(tmp_path.iterdir()) == []
        return
    (partial,) = tmp_path.iterdir()
    assert (partial / "model-00001-of-00003.safetensors").exists()
    with pytest.raises(UserError, match="neither"):
        open_checkpoint(partial)
    write(output, {"decoder.weight": torch.ones(2)})  # the next one clears up
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def peak_of_writing(folder: str, tensors: int, size: int) -> int:
    """On the crew: by how much the process's memory grows at its peak while tensors of `size` bytes are written."""
    from opt_parallel.report.metrics import forget_peak_memory, peak_memory

    def source(name: str, shard: Shard) -> Tensor:
        return torch.ones(shard.shape)

    cpu = torch.device("cpu")
    parameters = [(f"decoder.{number}", whole(size // 4)) for number in range(tensors)]
    write_folder(Path(folder) / "first", {}, parameters[:1], source, torch.float32, 10**12)  # code and buffers
    forget_peak_memory(cpu)
    before = peak_memory(cpu)
    write_folder(Path(folder) / "second", {}, parameters, source, torch.float32, 10**12)
    return peak_memory(cpu) - before


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a span is Linux's to tell")
def test_memory_is_one_tensor_whatever_the_shard(crew: Any, tmp_path: Path) -> None:
    size = 1 << 25
    (peak,) = crew(1)(peak_of_writing, str(tmp_path), 8, size)
    assert peak < 2.5 * size, f"{peak:,} bytes for tensors of {size:,}"  # the tensor, and a byte a value to check it


def write_together(folder: str) -> str:
    """On the crew: a source that gathers, in a folder that can and in one that cannot be written."""
    from opt_parallel.parallel.collectives import all_gather_last
    from opt_parallel.parallel.topology import Topology

    with Topology.open(2) as topology:

        def source(name: str, shard: Shard) -> Tensor:
            return all_gather_last(torch.full((2,), float(topology.tensor.rank)), topology.tensor)

        parameters = [(f"decoder.{number}", whole(4)) for number in range(3)]
        path = Path(folder)
        arguments: Any = ({}, parameters, source, torch.float32, 10**9)
        write_folder(path / "export", *arguments, group=topology.tensor)
        try:
            write_folder(path / "a-file" / "export", *arguments, group=topology.tensor)
        except UserError as error:
            return str(error)
    return ""


def test_ranks_that_gather_write_one_folder_and_fail_together(crew: Any, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("in the way")
    first, second = crew(2)(write_together, str(tmp_path))
    assert "Not a directory" in first
    assert "rank 0 failed" in second
    assert [tensor.tolist() for tensor in stored_tensors(tmp_path / "export").values()] == [[0, 0, 1, 1]] * 3


def test_the_card_tells_what_is_known(trained: Callable[[str], Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    source = trained("pre-norm")
    rows = [
        {"kind": "train", "step": 1, "loss": 6.5},
        {"kind": "train", "step": 2, "loss": 6.25},
        {"kind": "validation", "step": 2, "loss": 6.125, "perplexity": 457.0},
        {"kind": "train", "step": 3, "loss": 5.0},  # of a later step than the checkpoint's
    ]
    metrics = source.parent.parent / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    export(source, tmp_path / "export", 10**9, ExportDtype.float32)
    metrics.rename(tmp_path / "metrics.jsonl")
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    facts = dict(re.findall(r"^\| (.+) \| (.+) \|$", card.text, flags=re.MULTILINE))
    assert facts["steps"] == "2 of 2"
    assert facts["sequences"] == "8"
    assert facts["training loss, nats per token, step 2"] == "6.2500"
    assert facts["validation loss, nats per token, step 2"] == "6.1250"
    assert facts["parameters"] == f"{open_checkpoint(source).config.parameters():,}"
    assert "zero:\n  stage: 1\n" in card.text

    aside = shutil.copytree(source, tmp_path / "run" / "checkpoints" / "step-2.abandoned")
    shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "run")  # which now tells of the branch that goes on
    export(aside, tmp_path / "again", 10**9, ExportDtype.float32)
    assert "loss" not in (tmp_path / "again" / "README.md").read_text()


TRAITS = (
    "do_layer_norm_before", "has_final_layer_norm", "embedding_size", "enable_bias", "layer_norm_elementwise_affine",
    "activation_function", "dropout", "layerdrop", "std",
)  # fmt: skip


def test_a_network_read_back_is_the_same(trained: Callable[[str], Path], tmp_path: Path) -> None:
    for variant in VARIANTS:
        source, output = trained(variant), tmp_path / variant
        export(source, output, 10**9, ExportDtype.float32)
        ours, read = open_checkpoint(source).config, open_checkpoint(output).config
        for name in TRAITS:
            assert getattr(ours, name) == getattr(read, name), (variant, name)
