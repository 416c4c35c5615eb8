"""Trains a small network with the engine in any parallel layout, and in a single process without DeepSpeed."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.run import (
    ActivationCheckpointing,
    Offload,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    PrecisionConfig,
    Run,
    ScheduleConfig,
    StateDtype,
    ZeroConfig,
)
from opt_parallel.data.samples.samples import Batch
from opt_parallel.runtime.clock import Clock

TINY = {
    "vocab_size": 515,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 256,
    "max_position_embeddings": 64,
    "init_std": 0.08,
    "attention_dropout": 0.0,
}  # 515 is not a multiple of 2 or 4, so the vocabulary is always padded
STYLE_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parallel layout: tensor and data degrees, ZeRO stage, micro-batch, recomputation, offload, sequence
    parallelism."""

    tensor: int = 1
    data: int = 1
    stage: int = 0
    micro: int = 1
    recompute: str = "none"
    offload: bool = False
    precision: str = "fp32"
    sequence: bool = True

    @property
    def world(self) -> int:
        return self.tensor * self.data

    def __str__(self) -> str:
        modes = [self.recompute] * (self.recompute != "none") + ["cpu"] * self.offload + ["whole"] * (not self.sequence)
        extras = "".join(f"-{mode}" for mode in modes)
        plain = f"t{self.tensor}d{self.data}z{self.stage}m{self.micro}{extras}"
        return plain if self.precision == "fp32" else f"{plain}-{self.precision}"


def pairwise(layouts: list[Layout]) -> list[Layout]:
    """A subset of `layouts` in which every pair of settings that occurs in `layouts` occurs at least once."""
    wanted = set().union(*map(_pairs, layouts))
    chosen: list[Layout] = []
    while missing := wanted.difference(*map(_pairs, chosen)):
        chosen.append(max(layouts, key=lambda layout: len(_pairs(layout) & missing) / layout.world**0.4))
    for layout in sorted(chosen, key=lambda layout: layout.world, reverse=True):
        others = [other for other in chosen if other != layout]
        if wanted == set().union(*map(_pairs, others)):
            chosen = others
    return chosen


def _pairs(layout: Layout) -> set[Any]:
    return set(itertools.combinations(dataclasses.asdict(layout).items(), 2))


def run_for(
    layout: Layout, model: dict[str, Any] | None = None, steps: int = 5, lr: float = 1e-3, batch: int = 8
) -> Run:
    return Run(
        model=ModelConfig(**{**TINY, "layerdrop": 0.2, **(model or {})}),
        parallel=ParallelConfig(tensor=layout.tensor, sequence=layout.sequence),
        zero=ZeroConfig(
            stage=layout.stage,
            offload=Offload.cpu if layout.offload else Offload.none,
            persistence_threshold=0,
            prefetch_bucket_size=10_000,
            reduce_bucket_size=50_000,
        ),
        precision=PrecisionConfig(name=Precision(layout.precision), initial_scale=16.0),
        optimizer=OptimizerConfig(lr=lr, clip=0.5, eps=1e-6),
        schedule=ScheduleConfig(warmup_steps=2),
        data=dataclasses.replace(Run().data, sequence_length=16),
        batch={"global": batch, "micro": layout.micro},
        activation_checkpointing=ActivationCheckpointing(layout.recompute),
        steps=steps,
    )


def in_bf16(run: Run) -> Run:
    """The same run with bf16 moments and no fp32 copy of the weights. Without clipping, data ranks and ZeRO stages give
    the same bits, because the factor of clipping depends on the order in which squares are summed."""
    optimizer = dataclasses.replace(run.optimizer, state_dtype=StateDtype.bf16, clip=0.0)
    return dataclasses.replace(run.in_precision(Precision.bf16), optimizer=optimizer)


def batch_of(run: Run, samples: range) -> Batch:
    """A batch of synthetic samples, which are pure functions of their indices and have some ignored labels."""
    length = run.data.sequence_length
    rows, labels = [], []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample)
        row = torch.randint(4, run.model.vocab_size, (length + 1,), generator=generator)
        targets = row[1:].clone()
        targets[torch.rand(length, generator=generator) < (sample % 5) / 5] = -100
        rows.append(row[:-1])
        labels.append(targets)
    return Batch(torch.stack(rows), torch.stack(labels), None, None, torch.tensor(list(samples)))


def micro_batches(run: Run, step: int, data_rank: int, data_size: int) -> list[Batch]:
    start, micro = step * run.global_batch, run.micro_batch
    firsts = range(start + data_rank * micro, start + run.global_batch, data_size * micro)
    return [batch_of(run, range(first, first + micro)) for first in firsts]


def train(run: Run) -> tuple[list[float], list[float], dict[str, Any]]:
    """Train on each worker process. Return losses, gradient norms, and this rank's part of each weight as (range,
    values)."""
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology

    with Topology.open(run.parallel.tensor) as topology:
        engine = Engine.build(run, topology, random_source(run.seed))
        losses, norms = [], []
        for step in range(run.steps):
            result = engine.step(micro_batches(run, step, topology.data.rank, topology.data.size), Clock(step))
            losses.append(float(result.loss))
            norms.append(float(result.grad_norm))
        weights = weights_of(engine)
        engine.close()
    return losses, norms, weights


def weights_of(engine: Any) -> dict[str, Any]:
    """This tensor rank's part of each fp32 weight as (shape of the full tensor, range, values).

    All worker processes must call this function."""
    from deepspeed.utils import safe_get_full_fp32_param

    from opt_parallel.parallel.shard import marked

    weights = {}
    for name, tensor, shard in marked(engine.wrapped.module):
        whole = tensor.detach() if engine.run.zero.stage == 0 else safe_get_full_fp32_param(tensor)
        part = whole.view(shard.local_shape)[shard.real].float().cpu()
        weights[name] = (shard.shape, shard.range, part.numpy().copy())
    return weights


def rate_at(run: Run, clock: Clock) -> float:
    """The learning rate of the run's optimizer step that ends at `clock`."""
    from opt_parallel.optim import learning_rate

    return learning_rate(run.optimizer.lr, run.schedule, run.steps, run.batch_tokens, clock)


def train_plainly(run: Run) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The losses, gradient norms and weights of the same run in one process without DeepSpeed.

    They are the expected values for every layout."""
    from opt_parallel.model.heads import CausalLM
    from opt_parallel.optim import build_optimizer
    from opt_parallel.parallel.random import Draw
    from opt_parallel.parallel.shard import fill, random_source
    from opt_parallel.parallel.topology import ALONE

    with torch.device("meta"):
        model = CausalLM(run.model, ALONE)
    fill(model, random_source(run.seed), torch.device("cpu"), torch.float32)
    optimizer = build_optimizer(model, run.optimizer)
    losses, norms = [], []
    for step in range(run.steps):
        batch = batch_of(run, range(step * run.global_batch, (step + 1) * run.global_batch))
        draw = Draw(run.seed, step, 0, 0, batch.samples)
        loss = model(batch.ids, batch.labels, draw=draw) / int((batch.labels != -100).sum())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip)))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run, Clock(step + 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: tensor.detach() for name, tensor in model.named_parameters()}


def assemble(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Assemble the full tensors from the parts of all ranks, and assert that copies on several ranks are equal."""
    whole: dict[str, Tensor] = {}
    for weights in parts:
        for name, (shape, ranges, values) in weights.items():
            tensor = whole.setdefault(name, torch.full(shape, float("nan"), dtype=torch.from_numpy(values).dtype))
            there, here = tensor[ranges], torch.from_numpy(values)
            assert bool((there.isnan() | (there == here)).all()), f"{name}: two ranks disagree"
            tensor[ranges] = here
    assert not any(bool(tensor.isnan().any()) for tensor in whole.values())
    return whole
