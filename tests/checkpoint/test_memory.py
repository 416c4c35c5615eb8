"""A model larger than the memory: said before anything is loaded, with what is needed, what is free and a way out."""

from __future__ import annotations

import dataclasses
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, python, write_text
from exporting import tampered
from hugging_face import random_model
from layouts import Layout, run_for

from opt_parallel.checkpoint import memory
from opt_parallel.checkpoint.memory import RUN, SCRIPT, WORK, choose_dtype
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.config.run import DataConfig, Precision, PrecisionConfig, RunConfig
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.huggingface import names
from opt_parallel.parallel.passing import filled_in_turn
from opt_parallel.parallel.topology import Topology
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export
from opt_parallel.tools.verify import verify

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ALL = {Precision.fp32, Precision.bf16, Precision.fp16}
SLOW = {Precision.fp32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The same model in three dtypes, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for dtype in (FP32, BF16, FP16):
        random_model({"vocab_size": 300}).to(dtype).save_pretrained(root / str(dtype))
        save_tokenizer(train_tokenizer(["some text"], 300), root / str(dtype))
    return {dtype: root / str(dtype) for dtype in (FP32, BF16, FP16)}


def needed(folder: Path, dtype: torch.dtype) -> int:
    opened = open_checkpoint(folder)
    return memory._needed(opened, memory.ALONE, dtype, 0)


def chosen(folder: Path, asked: torch.dtype | None, able: set[Precision], free: int) -> torch.dtype:
    """On a device that multiplies in `able`, with so much memory free."""
    with pytest.MonkeyPatch.context() as patch, Topology.open(1) as topology:
        patch.setattr(memory, "native", lambda device: able)
        patch.setattr(memory, "memory_free", lambda processes: free)
        return choose_dtype(open_checkpoint(folder), topology, asked, SCRIPT)


@pytest.mark.parametrize(
    ("own", "asked", "able", "fits", "dtype", "word"),
    [
        (FP32, None, ALL, FP32, FP32, ""),
        (BF16, None, ALL, BF16, BF16, ""),
        (FP16, None, ALL, FP16, FP16, ""),
        (BF16, None, SLOW, FP32, FP32, "computing in float32"),
        (FP16, None, SLOW, FP32, FP32, "computing in float32"),
        (BF16, None, SLOW, BF16, BF16, "warning: the CPU emulates bfloat16"),  # float32 does not fit
        (BF16, BF16, SLOW, FP32, BF16, "warning: the CPU emulates bfloat16"),
        (FP32, FP16, SLOW, FP32, FP16, "warning: the CPU emulates float16"),
        (BF16, FP32, ALL, FP32, FP32, ""),
    ],
)
def test_auto_is_the_checkpoints_own_where_it_is_native(
    folders: dict[torch.dtype, Path], capsys: pytest.CaptureFixture[str], own: torch.dtype, asked: torch.dtype | None,
    able: set[Precision], fits: torch.dtype, dtype: torch.dtype, word: str,
) -> None:  # fmt: skip
    assert chosen(folders[own], asked, able, needed(folders[own], fits)) is dtype
    printed = capsys.readouterr()
    assert printed.out == ""  # a text's
    assert word in printed.err
    assert bool(printed.err) == bool(word)


def test_what_does_not_fit_is_one_line(folders: dict[torch.dtype, Path]) -> None:
    folder = folders[FP32]
    with pytest.raises(UserError, match=r"needs \d+ MB .* in float32, but \d+ MB are free") as raised:
        chosen(folder, None, ALL, needed(folder, BF16))
    assert "--dtype bfloat16 needs" in str(raised.value)
    assert "--tensor" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError) as raised:
        chosen(folder, FP16, ALL, WORK)
    assert "--dtype" not in str(raised.value)  # none fits


def in_little(folder: Path, poor: int) -> str:
    """On the crew: what a rank is told where rank `poor` has next to no memory."""
    from opt_parallel.runtime.process import rank

    with pytest.MonkeyPatch.context() as patch, Topology.open(2) as topology:
        patch.setattr(memory, "memory_free", lambda processes: 10**12 if rank() != poor else processes)
        try:
            return str(choose_dtype(open_checkpoint(folder), topology, None, RUN))
        except UserError as error:
            return str(error)


def test_all_ranks_are_told(crew: Any, folders: dict[torch.dtype, Path]) -> None:
    first, second = crew(2)(in_little, folders[FP32], 1)
    assert first == second
    assert "rank 1" in first
    assert "2 B are free" in first  # shared by the ranks of the host
    assert "parallel.tensor" in first


def said(monkeypatch: pytest.MonkeyPatch, *command: str) -> str:
    """The error of a command's main function, where hardly any memory is free."""
    monkeypatch.setattr(memory, "memory_free", lambda processes=1: 10**6)
    monkeypatch.setattr(sys, "argv", list(command))
    main = runpy.run_path(str(ROOT / "opt_parallel" / "commands" / command[0]), run_name="script")["main"]
    with pytest.raises(UserError) as raised:
        main()
    return str(raised.value)


def test_every_script_says_so_before_it_loads(
    folders: dict[torch.dtype, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders[BF16]

    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("opt_parallel.huggingface.names.HuggingFaceWeights._read", read)
    from opt_parallel.tools.evaluate import evaluate

    here, out = ["--checkpoint", str(folder)], tmp_path / "out"
    lines = [
        said(monkeypatch, "generate.py", *here, "--prompt", "text", "--max-new-tokens", "4"),
        said(monkeypatch, "export.py", *here, "--output", str(out)),
        said(monkeypatch, "verify.py", *here),
    ]
    held_out = write_text(tmp_path)
    run = dataclasses.replace(
        run_for(Layout(stage=1), {"vocab_size": 300, "max_position_embeddings": 32}),
        precision=PrecisionConfig(),
        data=DataConfig(
            validation=str(held_out), tokenizer=str(folder), sequence_length=16, cache=str(tmp_path / "cache")
        ),
        init_from=str(folder),
        run=RunConfig("test", str(tmp_path / "run")),
    )
    with pytest.raises(UserError) as raised:
        evaluate(run)
    lines.append(str(raised.value))
    for line in lines:
        assert "1 MB" in line, line
        assert " MB of memory" in line
    assert not out.exists()


def test_an_export_needs_its_largest_tensor_four_times(
    folders: dict[torch.dtype, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is read, the next one that is read ahead, a rearranged copy, and what is written."""
    largest = memory.largest_parameter(open_checkpoint(folders[BF16]))
    for own, dtype, each in (
        (BF16, ExportDtype.auto, 8),
        (BF16, ExportDtype.float32, 10),
        (FP32, ExportDtype.auto, 16),
    ):
        enough, output = each * largest + WORK, tmp_path / f"{own}-{dtype}"
        monkeypatch.setattr(memory, "memory_free", lambda enough=enough: enough - 1)
        with pytest.raises(UserError, match=r"its largest tensor needs \d+ MB of memory, but \d+ MB are free"):
            export(folders[own], output, 10**9, dtype)
        monkeypatch.setattr(memory, "memory_free", lambda enough=enough: enough)
        export(folders[own], output, 10**9, dtype)


def test_values_are_compared_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "CHUNK", 4)
    one = torch.arange(30.0).view(5, 6)
    one[2, 2] = float("nan")
    other = one.clone()
    assert names.compare_values(one, other) == (0, 0.0)
    assert names.compare_values(one, other.to(BF16)) == (0, 0.0)  # whole numbers this small
    other[0, 1] += 2
    other[4, 5] -= 3  # in another part, the last
    assert names.compare_values(one, other) == (2, 3.0)
    other[1, 0] = float("nan")  # a NaN and a number
    count, largest = names.compare_values(one, other)
    assert count == 3
    assert math.isnan(largest)


def compared() -> int:
    """On the crew: by how much comparing two tensors of 64 MB raises the process's peak."""
    from memory import forget_peak, peak_memory

    one, other = (torch.full((2**25,), 0.5, dtype=BF16) for _ in range(2))
    names.compare_values(one[:9], other[:9])
    forget_peak()
    before = peak_memory()
    assert names.compare_values(one, other) == (0, 0.0)
    return peak_memory() - before


def test_comparing_takes_no_memory_of_the_tensors_size(crew: Any) -> None:
    (rise,) = crew(1)(compared)
    assert rise < 80 * 2**20, f"{rise:,}"


def test_an_export_keeps_the_dtype(folders: dict[torch.dtype, Path], tmp_path: Path) -> None:
    for dtype, folder in folders.items():
        export(folder, tmp_path / str(dtype), 10**9, ExportDtype.auto)
        assert open_checkpoint(tmp_path / str(dtype)).dtype is dtype
    mixed = tampered(folders[BF16], tmp_path / "mixed", widen)
    assert open_checkpoint(mixed).dtype is FP32  # which holds both


def widen(tensors: dict[str, Any]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].float()


def held(model: torch.nn.Module) -> list[str]:
    """The parameters of `model` that are in memory."""
    return [name for name, tensor in model.named_parameters() if tensor.device.type != "meta"]


def test_a_model_filled_in_turn_holds_one_module(folders: dict[torch.dtype, Path]) -> None:
    opened = open_checkpoint(folders[FP32])
    model = memory.network_of(opened)
    most: list[list[str]] = []

    def source(name: str, shard: Any) -> torch.Tensor:
        most.append(held(model))
        return opened.weights(name, shard)

    ids = torch.arange(8)[None]
    with torch.no_grad(), filled_in_turn(model, source, torch.device("cpu"), FP32):
        found, whole = model(ids), opened.model(memory.ALONE, torch.device("cpu"))(ids)
        assert not held(model)
        with pytest.raises(RuntimeError, match="indices"):
            model(ids.float())
        assert not held(model)
    assert max(map(len, most)) == 1  # a weight, while its bias is read
    assert torch.equal(found, whole)


def verified(small: Path, large: Path) -> tuple[int, int, bool]:
    """On the crew: the process's peak before and after it verifies `large`; and whether that agrees. A small one comes
    first, for what the libraries take anyway."""
    from memory import forget_peak, peak_memory

    verify(small)
    forget_peak()
    before = peak_memory()
    verdict = verify(large)
    assert verdict is not None
    return before, peak_memory(), verdict.agrees


@pytest.mark.long
@pytest.mark.parametrize("files", [1, 5])
def test_verify_never_holds_a_whole_model(
    crew: Any, folders: dict[torch.dtype, Path], tmp_path: Path, files: int
) -> None:
    """Matrices of 64 MB in fp32, which glibc gives back to the system at once."""
    import transformers

    torch.manual_seed(1)
    shape = {"hidden_size": 1024, "ffn_dim": 16384, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = transformers.OPTConfig(vocab_size=300, **shape, word_embed_proj_dim=1024)
    model = transformers.OPTForCausalLM(config).to(BF16)
    whole = 4 * sum(each.numel() for each in model.parameters())  # in fp32, 600 MB
    model.save_pretrained(tmp_path / "large", max_shard_size=whole // 2 // files + 1)
    del model
    ((before, after, agrees),) = crew(1)(verified, folders[BF16], tmp_path / "large")
    assert agrees
    assert after - before < 0.75 * whole, f"{after - before:,} of {whole:,}"


def test_pytorchs_own_files_are_verified_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    model.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    verdict = verify(tmp_path / "model")
    assert verdict is not None
    assert verdict.agrees, verdict
    monkeypatch.setattr(memory, "memory_free", lambda: 10**6)
    with pytest.raises(UserError, match="opt-parallel export"):
        verify(tmp_path / "model")


LIMITED = """
import os, resource, sys, torch
from opt_parallel.runtime.errors import reporting
from opt_parallel.checkpoint.sources import open_checkpoint
with reporting():
    opened = open_checkpoint(sys.argv[1])
    used = int(open("/proc/self/status").read().partition("VmSize:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20,) * 2)
    if sys.argv[2] == "map":
        opened.stored.files.read("model.decoder.final_layer_norm.bias", (slice(0, 1),))
    torch.empty(2**40)
"""


@pytest.mark.parametrize("what", ["map", "allocate"])
def test_out_of_memory_is_called_so(tmp_path: Path, what: str) -> None:
    """A file that cannot be mapped within `ulimit -v`, and an allocation: no damaged file, no traceback."""
    random_model({"vocab_size": 30_000}).save_pretrained(tmp_path)  # 6 MB, more than the limit leaves
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    done = python(str(script), str(tmp_path), what)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "out of memory" in line
    assert "ulimit -v" in line
    assert "complete copy" not in line
    assert (str(tmp_path) in line) == (what == "map")
