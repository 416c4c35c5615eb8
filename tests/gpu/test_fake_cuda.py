"""The network on fake CUDA tensors, without a GPU: devices, waiting for the device, memory, and collectives.

The tracing runs in a process of its own (`tests/gpu/traced.py`), because a process keeps the CUDA device that computes
nothing. It starts cold, because the autograd engine of the fork server has already counted the devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command import ROOT, cold_python, launch, python
from layouts import STYLE_350M, TINY
from torch import Tensor

from opt_parallel.config.model import Labels, ModelConfig, ProblemType
from opt_parallel.config.run import ActivationCheckpointing, ParallelConfig, Precision, PrecisionConfig, Run
from opt_parallel.config.task import LoraConfig

COMPILER = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler, for the fake CUDA device"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a build of torch for CPUs"),
]


def alone(function: str, *arguments: str) -> Any:
    """What a function of this file prints in a new process, as JSON."""
    process = cold_python("tests/support/call.py", __file__, function, *arguments, timeout=1200)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(traced: Any) -> Any:
    return traced["network"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A network, its parallel layout, and the kind of its batches."""

    tensor: int = 1
    recompute: str = "none"
    precision: str = "bf16"
    style_350m: bool = False
    packed: bool = False
    classifies: bool = False
    lora: bool = False
    sequence: bool = True

    @property
    def run(self) -> Run:
        style = STYLE_350M if self.style_350m else {}
        return Run(
            model=ModelConfig(**{**TINY, **style, "num_hidden_layers": 2, "layerdrop": 0.5, "attention_dropout": 0.1}),
            parallel=ParallelConfig(tensor=self.tensor, sequence=self.sequence),
            precision=PrecisionConfig(Precision(self.precision)),
            data=dataclasses.replace(Run().data, sequence_length=16),
            batch={"global": 4, "micro": 4},
            activation_checkpointing=ActivationCheckpointing(self.recompute),
        )


def step(cell: Cell, damage: Callable[[Any], None] = lambda model: None) -> None:
    """A forward, a backward and an update of the weights on fake CUDA tensors, watched by a strict ledger."""
    from opt_parallel.model.build import network
    from opt_parallel.optim import build_optimizer
    from opt_parallel.parallel.random import Draw
    from opt_parallel.parallel.shard import fill
    from opt_parallel.parallel.topology import DTYPES
    from opt_parallel.rehearsal.fake_cuda import DEVICE, fake_tensors, group_of
    from opt_parallel.rehearsal.ledger import Ledger, Trace
    from opt_parallel.rehearsal.trace import nothing

    run, group = cell.run, group_of(cell.tensor)
    labels = Labels(("a", "b", "c"), ProblemType.single_label_classification) if cell.classifies else None
    lora = LoraConfig(rank=2 * cell.lora, targets=["q_proj", "fc2"])
    with fake_tensors():
        model = network(run.model, lora, labels, group, run.activation_checkpointing, run.parallel.sequence)
        fill(model, nothing, DEVICE, DTYPES[run.precision.name])
        damage(model)
        optimizer = build_optimizer(model, run.optimizer)
        shape = (run.micro_batch, run.data.sequence_length)
        with Ledger(Trace(cell.run.model.num_hidden_layers), [], {}, strict=True):
            ids = torch.zeros(shape, dtype=torch.long, device=DEVICE)
            segments = torch.ones_like(ids) if cell.packed else None
            wanted = torch.zeros(shape[:1] if cell.classifies else shape, dtype=torch.long, device=DEVICE)
            draw = Draw(run.seed, 0, 0, 0, torch.zeros(shape[0], dtype=torch.long, device=DEVICE))
            (model(ids, wanted, None, segments, draw) * 1.0).backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert not parameter.requires_grad or (gradient is not None and gradient.is_cuda), name


def errors_of(cells: list[Cell]) -> dict[str, str]:
    """The errors of the cells that fail."""
    said = {}
    for cell in cells:
        try:
            step(cell)
        except Exception:
            said[str(cell)] = traceback.format_exc()
    return said


KINDS = [kind.value for kind in ActivationCheckpointing]
FEW = [
    Cell(),
    Cell(tensor=2, style_350m=True, packed=True, sequence=False),
    Cell(tensor=2, classifies=True, lora=True, precision="fp16"),
    *(Cell(tensor=2, recompute=kind) for kind in KINDS[1:]),
]
ALL = [Cell(*values) for values in itertools.product((1, 2), KINDS, ("fp32", "bf16", "fp16"), *[(False, True)] * 5)]


def print_errors_of_all() -> None:
    from opt_parallel.rehearsal.fake_cuda import load

    load()
    print(json.dumps(errors_of(ALL)))


def test_everything_stays_on_the_device(found: Any) -> None:
    assert found["errors"] == {}


@pytest.mark.long
def test_everything_stays_on_the_device_in_every_cell() -> None:
    assert alone("print_errors_of_all") == {}


class Reads(torch.autograd.Function):
    """A function whose backward reads a value."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * gradient.sum().item()


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor on the CPU": lambda hidden: hidden * torch.ones(hidden.size(-1)),
    "a number on the CPU": lambda hidden: hidden * torch.tensor(2.0),
    "item": lambda hidden: hidden * hidden.sum().item(),
    "item in the backward": Reads.apply,  # type: ignore[dict-item]
    "bool": lambda hidden: hidden if hidden.isnan().any() else hidden * 2,
    "cpu": lambda hidden: hidden * hidden.sum().cpu().to(hidden.device),
    "tolist": lambda hidden: hidden * hidden.flatten()[:1].tolist()[0],
    "nonzero": lambda hidden: hidden + hidden.nonzero().sum(),
}


def errors_of_faults(recompute: str) -> dict[str, str]:
    """The error of each fault in the activation of a layer. It is empty if the fault is not found."""
    said = {}
    for name, fault in FAULTS.items():

        def damage(model: Any, fault: Callable[[Tensor], Tensor] = fault) -> None:
            model.decoder.layers[1].activation = fault

        try:
            step(Cell(recompute=recompute), damage)
            said[name] = ""
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def test_planted_faults_are_found(found: Any) -> None:
    assert [name for name in FAULTS if not found["faults"][name]] == []


BATCH, LENGTH, WIDTH, HEADS, LAYERS = 4, 2048, 64, 4, 8
UNIT = 2 * BATCH * LENGTH * WIDTH  # bytes of the hidden states in bf16


def traced_run(tensor: int, recompute: str, sequence: bool = False) -> Run:
    """A run whose activations are much larger than its weights. Dropout keeps nothing for the backward."""
    model = ModelConfig(
        vocab_size=512, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=4 * WIDTH,
        max_position_embeddings=LENGTH, dropout=0.0, attention_dropout=0.1,
    )  # fmt: skip
    return Run(
        model=model,
        parallel=ParallelConfig(tensor=tensor, sequence=sequence),
        precision=PrecisionConfig(Precision.bf16),
        data=dataclasses.replace(Run().data, sequence_length=LENGTH),
        batch={"global": BATCH, "micro": BATCH},
        activation_checkpointing=ActivationCheckpointing(recompute),
    )


def plain(trace: Any) -> dict[str, Any]:
    return {
        **dataclasses.asdict(trace), "peak": trace.peak, "messages": trace.messages(), "sent": trace.sent()
    }  # fmt: skip


def results() -> dict[str, Any]:
    """In a process of its own: what the tests check."""
    from opt_parallel.benchmarks.memory import row
    from opt_parallel.rehearsal import trace

    runs = {
        "1 none": traced_run(1, "none"),
        "2 none": traced_run(2, "none"),
        "2 full": traced_run(2, "full"),
        "2 sequence": traced_run(2, "none", sequence=True),
    }
    traces = {"whole": trace.trace(runs["2 none"], LAYERS), "2 none": trace.extrapolated(runs["2 none"])}
    with mock.patch.object(trace, "DEPTHS", (2, 3)):  # faster, and these layers are equal from the first on
        traces |= {name: trace.extrapolated(run) for name, run in runs.items() if name not in traces}
    return {
        "errors": errors_of(FEW),
        "faults": errors_of_faults("none"),
        "traces": {name: plain(one) for name, one in traces.items()},
        "row": row(runs["2 sequence"], traces["2 sequence"]),
        "none": peaks(["none"])["none"],
    }


def peaks(kinds: list[str]) -> dict[str, int]:
    """The peaks that are measured on a GPU, traced again."""
    sys.path.insert(0, str(Path(__file__).parent))
    from cells import cells

    from opt_parallel.rehearsal.trace import trace

    runs = cells()
    return {kind: trace(runs[kind], runs[kind].model.num_hidden_layers).peak for kind in kinds}


@pytest.fixture(scope="module")
def traces(found: Any) -> Any:
    return found["traces"]


@pytest.mark.parametrize(("name", "tensor", "shared"), [("1 none", 1, 1), ("2 none", 2, 1), ("2 sequence", 2, 2)])
def test_a_layer_saves_what_the_formula_says(traces: Any, name: str, tensor: int, shared: int) -> None:
    """Without recomputation: the input, both LayerNorms' results and the residual sum, of all positions or with
    sequence parallelism of this rank's; query, key and value (3), attention's result (1) and the activation (4) of
    this rank's heads and features."""
    saved = UNIT * (4 / shared + 8 / tensor)
    saved += (
        4 * BATCH * LENGTH * (2 * 2 / shared + HEADS / tensor)
    )  # means and deviations of LayerNorms, attention's sums
    saved += 2 * 512  # the state of attention's random generator
    assert traces[name]["saved_by_a_layer"] == saved


def test_the_peak_is_what_the_formula_says(traces: Any) -> None:
    """With full recomputation, the peak is in the backward of the last layer's activation: the inputs of all layers,
    the layer's tensors without its input, the gradient of its output, and both gradients around the activation."""
    peak = UNIT * (LAYERS + 3 + 8 / 2 + 1 + 2 * 4 / 2)
    assert traces["2 full"]["peak"] == pytest.approx(peak, rel=0.02)  # the rest: token ids, sums, a gradient


def test_collectives_of_a_forward_and_a_backward(traces: Any) -> None:
    """An all-reduce after the embedding and for each half of a layer, in the forward and in the backward; full
    recomputation repeats that of the attention. The loss exchanges three fp32 numbers for each token."""
    words = BATCH * LENGTH * 3 * 2 * 4
    for kind, times in (("none", 4 * LAYERS + 2), ("full", 5 * LAYERS + 2)):
        found = traces[f"2 {kind}"]
        assert found["messages"] == {"all-reduce": times, "all-gather": 1}
        assert found["sent"] == {"all-reduce": times * UNIT, "all-gather": words}
    assert traces["1 none"]["messages"] == {}


def test_collectives_of_sequence_parallelism(traces: Any) -> None:
    """A reduce-scatter in place of each all-reduce, and an all-gather for each. The backward of each column-parallel
    layer gathers its input once more, and short all-reduces sum the gradients of parameters that all ranks hold."""
    messages = traces["2 sequence"]["messages"]
    assert messages["reduce-scatter"] == 4 * LAYERS + 2
    assert messages["all-gather"] == 6 * LAYERS + 2 + 1  # 1: the loss
    assert traces["2 sequence"]["sent"]["all-reduce"] < UNIT


def test_the_extrapolation_equals_the_trace_of_the_full_depth(traces: Any) -> None:
    whole, extrapolated = traces["whole"], traces["2 none"]
    assert {**whole, "saved_by_a_layer": extrapolated["saved_by_a_layer"]} == extrapolated


def print_peaks() -> None:
    from opt_parallel.rehearsal.fake_cuda import load

    load()
    print(json.dumps(peaks(KINDS)))


TRACED = Path(__file__).with_name("traced.json")


def test_the_peak_to_measure_on_a_gpu_is_up_to_date(found: Any) -> None:
    """`PYTHONPATH=.:tests/support python tests/gpu/checks.py trace --device cpu` writes the file again."""
    assert found["none"] == json.loads(TRACED.read_text())["none"]


@pytest.mark.long
def test_all_peaks_to_measure_on_a_gpu_are_up_to_date() -> None:
    assert alone("print_peaks") == json.loads(TRACED.read_text())


def test_a_row_of_the_table(found: Any) -> None:
    layers, tensor, sequence, micro, recompute, precision, peak, saved, _, collectives = found["row"]
    assert layers == f"{LAYERS} × 64"
    assert (tensor, sequence, micro, recompute, precision) == ("2", "yes", "4", "none", "bf16")
    traced = found["traces"]["2 sequence"]
    assert peak == f"{traced['peak'] / 2**30:.2f} GiB"
    assert saved == f"{traced['saved_by_a_layer'] / 2**20:,.1f} MiB"
    messages, sent = traced["messages"], traced["sent"]
    assert collectives == "; ".join(f"{messages[kind]} {kind}, {sent[kind] / 2**30:.2f}" for kind in messages)


@pytest.mark.long
def test_the_command_prints_a_row_for_each_combination() -> None:
    settings = ["model=opt-tiny", "activation_checkpointing=none,full", "data.sequence_length=32"]
    process = python(str(ROOT / "scripts" / "benchmark.py"), "memory", *settings)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == 3


def print_refusals(folder: str) -> None:
    """In a process of its own: the errors without a compiler, and with a build of torch for GPUs."""
    from opt_parallel.rehearsal.fake_cuda import load
    from opt_parallel.runtime.errors import UserError

    said = []
    os.environ |= {"XDG_CACHE_HOME": folder, "CXX": "/nonexistent/c++"}
    for version in (None, "13.0"):
        torch.version.cuda = version
        try:
            load()
        except UserError as error:
            said.append(str(error))
    print(json.dumps(said))


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    process = launch(1, "tests/support/call.py", __file__, "print_refusals", str(tmp_path))
    compiler, build = json.loads(process.stdout)
    assert compiler.startswith("/nonexistent/c++ was not found, and fake CUDA tensors need a C++ compiler")
    assert "is built for GPUs" in build
