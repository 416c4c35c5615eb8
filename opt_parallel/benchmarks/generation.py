"""Measure greedy generation by our model and by transformers with the same weights in one process, and the time of the
matrix products alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opt_parallel.config.model import ModelConfig
from opt_parallel.huggingface.config import config_for_hf
from opt_parallel.huggingface.names import to_hf
from opt_parallel.model.decoding import Decoding
from opt_parallel.model.generation import generate
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.linear import ColumnParallelLinear, Linear, RowParallelLinear
from opt_parallel.parallel.shard import fill, marked, random_source
from opt_parallel.parallel.topology import ALONE, local_device
from opt_parallel.parallel.vocab import VocabParallelHead
from opt_parallel.runtime.errors import UserError

HEAD = [["batch", "ours (range)", "transformers (range)", "ours ÷ theirs (range)", "products alone (range)"]]


def models(config: ModelConfig) -> tuple[CausalLM, Any]:
    """Our model with random weights, and transformers' model, which shares the weights' memory."""
    from transformers import OPTConfig, OPTForCausalLM

    device = local_device()
    with torch.device("meta"):
        ours = CausalLM(config, ALONE)
        theirs = OPTForCausalLM(OPTConfig(**config_for_hf(config, torch.float32)))
    fill(ours, random_source(1), device, torch.float32)
    named = {name: part for own, tensor, _ in marked(ours) for name, part in to_hf(own, tensor.detach()).items()}
    theirs.load_state_dict(named, strict=False, assign=True)
    theirs.tie_weights()
    return ours.eval(), theirs.eval()


def measure(config: ModelConfig, batch: int, prompt: int, new: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round to generate `new` tokens after prompts of `prompt` tokens. Both models take turns.

    Raises: UserError if the models generate different tokens or end early, so that their work differs.
    """
    ours, theirs = models(config)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, config.vocab_size, (batch, prompt), generator=generator).to(local_device())
    mask = torch.ones_like(ids)
    contenders: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: generate(ours, ids, mask, Decoding(max_new_tokens=new)),
        "transformers": lambda: theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False),
        "products": lambda: _products(ours, batch, new),
    }
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, rounds):
        output = {}
        for name, run in contenders.items():
            seconds, output[name] = _timed(run)
            if turn >= 0:
                measured[name].append(seconds)
        if not torch.equal(output["ours"], output["transformers"]) or output["ours"].size(1) != prompt + new:
            raise UserError(
                "our model and transformers generated different texts or ended early, so their times are meaningless"
            )
    return measured


def _products(model: CausalLM, batch: int, steps: int) -> Tensor:
    """Compute only the matrix products of the linear layers and the output projection, for `steps` tokens."""
    products = (Linear, ColumnParallelLinear, RowParallelLinear, VocabParallelHead)
    weights = [
        module.weight.view(-1, module.weight.size(-1)) for module in model.modules() if isinstance(module, products)
    ]
    inputs = {weight.size(-1): weight.new_ones(batch, 1, weight.size(-1)) for weight in weights}
    for _ in range(steps):
        for weight in weights:
            last = F.linear(inputs[weight.size(-1)], weight)
    return last


@torch.inference_mode()
def _timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    output = run()
    if output.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, output


def row(batch: int, measured: dict[str, list[float]]) -> list[str]:
    """The table row for one batch size, with medians and ranges of the times and of the ratios of each round."""
    cells = {name: _spread(times, 2, " s") for name, times in measured.items()}
    ratios = [ours / theirs for ours, theirs in zip(measured["ours"], measured["transformers"], strict=True)]
    return [str(batch), cells["ours"], cells["transformers"], _spread(ratios, 3), cells["products"]]


def _spread(values: list[float], digits: int, unit: str = "") -> str:
    return f"{statistics.median(values):.{digits}f}{unit} ({min(values):.{digits}f}–{max(values):.{digits}f})"
