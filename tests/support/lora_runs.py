"""Trains small LoRA runs on a checkpoint from transformers, on the pool of worker processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from hugging_face import VARIANTS, random_model
from layouts import Layout, micro_batches, rate_at, run_for
from torch import Tensor

from opt_parallel.config.run import Run, RunConfig
from opt_parallel.config.task import LORA_TARGETS, LoraConfig, Task, TaskConfig
from opt_parallel.runtime.clock import Clock

RANK, ALPHA = 4, 12.0


def write_base(folder: Path, variant: str = "pre-norm", kind: str = "OPTForCausalLM", **config: Any) -> Path:
    """Save a model with random weights with transformers, and return its folder."""
    random_model({**VARIANTS[variant], **config}, kind).save_pretrained(folder)
    return folder


def run_on(
    base: Path, folder: Path, layout: Layout, steps: int = 4, targets: tuple[str, ...] = LORA_TARGETS, **model: Any
) -> Run:
    """A LoRA run in `folder` that adapts `base` in `layout`, with the dropout rates in `model`."""
    from opt_parallel.checkpoint.inherit import model_at

    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    rates = {"dropout": 0.1, "attention_dropout": 0.0, "layerdrop": 0.2, **model}
    return dataclasses.replace(
        run_for(layout, steps=steps, lr=0.01),
        model=dataclasses.replace(model_at(base, ""), **rates),
        task=TaskConfig(lora=LoraConfig(RANK, ALPHA, list(targets))),
        run=RunConfig("lora", str(folder)),
        init_from=str(base),
    )


def go(run: Run, last: int, saves: tuple[int, ...] = ()) -> dict[str, Any]:
    """Train from the present step to step `last` on each worker process, and save checkpoints after the steps `saves`.

    The result is the losses, the gradient norms, and the frozen parameters that differ from the base."""
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.start import build_engine

    losses, norms = [], []
    start = open_checkpoint(str(run.init_from))
    with Topology.open(run.parallel.tensor) as topology:
        base = start.as_base(str(run.init_from))
        store = Store(run, topology, run.folder / "tokenizer", base=base)
        checkpoint = store.find()
        engine = build_engine(run, topology, store, checkpoint, start)
        clock = checkpoint.clock if checkpoint else Clock()
        while True:
            if clock.step in saves:
                store.save(engine, clock)
            if clock.step == last:
                break
            result = engine.step(micro_batches(run, clock.step, topology.data.rank, topology.data.size), clock)
            clock = clock.after(run.global_batch, result.tokens)
            losses.append(float(result.loss))
            norms.append(float(result.grad_norm))
        store.finish()
        moved = moved_from(engine, start.weights)
        engine.close()
    return {"losses": losses, "norms": norms, "moved": moved}


def moved_from(engine: Any, weights: Any) -> list[str]:
    """The names of the frozen parameters that differ from `weights`.

    If no trained parameter has changed, the result also has the names of the trained parameters. All worker processes
    must call this function."""
    import deepspeed

    from opt_parallel.parallel.shard import marked

    moved, frozen = [], 0
    for name, tensor, shard in marked(engine.wrapped.module):
        if not tensor.requires_grad:
            with deepspeed.zero.GatheredParameters([tensor], enabled=engine.run.zero.stage == 3):
                held = tensor.detach()[shard.real]
                moved += [] if torch.equal(held, weights(name, shard).to(held.dtype)) else [name]
            frozen += 1
    assert frozen > 20
    return moved


def go_plainly(run: Run) -> tuple[list[float], list[float]]:
    """The losses and gradient norms of the same run in one process without DeepSpeed."""
    from layouts import batch_of

    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.model.build import network
    from opt_parallel.optim import build_optimizer
    from opt_parallel.parallel.random import Draw
    from opt_parallel.parallel.shard import fill
    from opt_parallel.parallel.topology import ALONE
    from opt_parallel.start import weights as first_weights

    model = network(run.model, run.task.lora, None, ALONE)
    fill(model, first_weights(run.seed, open_checkpoint(str(run.init_from)), None), torch.device("cpu"), torch.float32)
    optimizer = build_optimizer(model, run.optimizer)
    losses, norms = [], []
    for step in range(run.steps):
        batch = batch_of(run, range(step * run.global_batch, (step + 1) * run.global_batch))
        loss = model(batch.ids, batch.labels, draw=Draw(run.seed, step, 0, 0, batch.samples))
        loss = loss / int((batch.labels != -100).sum())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip)))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run, Clock(step + 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def go_with_peft(run: Run, model: Any) -> list[float]:
    """The losses of the same run without dropout, with transformers and `peft`."""
    from layouts import batch_of

    tensors: list[Tensor] = [tensor for tensor in model.parameters() if tensor.requires_grad]
    settings = run.optimizer
    optimizer = torch.optim.AdamW(
        tensors, settings.lr, (settings.betas[0], settings.betas[1]), settings.eps, settings.weight_decay
    )
    losses = []
    for step in range(run.steps):
        batch = batch_of(run, range(step * run.global_batch, (step + 1) * run.global_batch))
        logits = model(input_ids=batch.ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(run, Clock(step + 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def random_adapter(run: Run, number_of_labels: int, names: tuple[str, ...] = ()) -> None:
    """Save a checkpoint of step 0 with random trained tensors, including B and a classifier's output layer.

    `names` are the names of the labels, which are numbers by default. All worker processes must call this function."""
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.config.model import Labels, ProblemType
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.start import build_engine
    from opt_parallel.zero import held_fragments

    labels = Labels.numbered(number_of_labels) if run.task.name is Task.classify else None
    labels = Labels(names, ProblemType.single_label_classification) if names else labels
    start = open_checkpoint(str(run.init_from))
    with Topology.open(run.parallel.tensor) as topology:
        base = start.as_base(str(run.init_from))
        store = Store(run, topology, run.folder / "tokenizer", labels, base)
        engine = build_engine(run, topology, store, None, start, labels)
        for fragment in held_fragments(engine.wrapped, run.zero.stage, topology.data.rank, engine.moments):
            where = f"{fragment.name} {fragment.shard.index} {fragment.start}"  # so that copies get the same values
            fragment.weights.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(crc32(where.encode())))
        store.save(engine, Clock())
        store.finish()
        engine.close()
