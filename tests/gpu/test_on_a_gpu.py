"""What only a GPU shows: its bits of dropout, its streams, and whether the host waits for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch
from command import cold_python
from layouts import TINY

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import ActivationCheckpointing, Precision, PrecisionConfig, Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU"),
]


def alone(function: str, *arguments: str) -> Any:
    """What a function of this file prints in a process of its own with one GPU, as JSON."""
    process = cold_python("tests/support/call.py", __file__, function, *arguments, CUDA_VISIBLE_DEVICES="0")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def print_dropped() -> None:
    """The number of elements that dropout drops on one device only, in a small tensor and in a compiled one."""
    from opt_parallel.parallel.random import Draw

    different = []
    for width in (64, 2048):
        hidden = torch.ones(4, 512, width)
        draws = [Draw(1, 0, 0, 0, torch.arange(4, device=device)) for device in ("cpu", "cuda")]
        one, other = (draw.dropout(hidden.to(draw.samples.device), 0.1, 3, 1) for draw in draws)
        different.append(int((one != other.cpu()).sum()))
    print(json.dumps(different))


def test_dropout_drops_the_same_elements_as_on_a_cpu() -> None:
    assert alone("print_dropped") == [0, 0]


def run_of(kind: ActivationCheckpointing) -> Run:
    return Run(
        model=ModelConfig(**{**TINY, "attention_dropout": 0.1, "num_hidden_layers": 6}),
        precision=PrecisionConfig(Precision.bf16),
        data=dataclasses.replace(Run().data, sequence_length=64),
        batch={"global": 4, "micro": 4},
        activation_checkpointing=kind,
    )


def gradients(kind: ActivationCheckpointing, times: int = 2) -> dict[str, torch.Tensor]:
    """The gradients on the GPU. In the last of several passes, waiting for the device is an error."""
    from opt_parallel.model.build import network
    from opt_parallel.parallel.shard import fill, random_source
    from opt_parallel.parallel.topology import ALONE
    from opt_parallel.rehearsal.trace import micro_batch_loss

    run, device = run_of(kind), torch.device("cuda", 0)
    model = network(run.model, run.task.lora, None, ALONE, kind)
    fill(model, random_source(1), device, torch.bfloat16)
    for left in reversed(range(times)):
        model.zero_grad()
        torch.cuda.set_sync_debug_mode("default" if left else "error")
        micro_batch_loss(model, run, device).backward()
    torch.cuda.set_sync_debug_mode("default")
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def print_differences() -> None:
    """The largest difference of a gradient with each kind of recomputation, over the largest gradient."""
    expected = gradients(ActivationCheckpointing.none)
    different = {}
    for kind in ActivationCheckpointing:
        found = gradients(kind)
        assert found.keys() == expected.keys()
        most = max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in found)
        different[kind.value] = most
    print(json.dumps(different))


def test_each_recomputation_gives_the_same_gradients_without_waiting() -> None:
    """In bf16, kernels that add in another order differ by some roundings of 1/256."""
    different = alone("print_differences")
    assert max(different.values()) <= 0.02, different
