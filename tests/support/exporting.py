"""Makes training checkpoints, and exported folders with an injected fault."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layouts import Layout, micro_batches, run_for
from safetensors.torch import load_file, save_file
from torch import Tensor

# The layout of 350m splits tensors in all ways: tensor parallelism, ZeRO and padding.
LAYOUTS = {"350m": Layout(tensor=2, data=2, stage=3, micro=2), "pre-norm": Layout(tensor=2, stage=1, micro=4)}
ONE_PROCESS = Layout(stage=1, micro=4)  # for the variants whose tensors have the shapes of these two, or are fewer
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "post-norm": {"do_layer_norm_before": False},
    "projected": {"word_embed_proj_dim": 32},
    "no-final-norm": {"remove_final_layer_norm": True},
    "gelu": {"activation_function": "gelu"},
    "bare": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}


def checkpoint(crew: Any, folder: Path, variant: str) -> Path:
    """Train two steps in the variant's layout, and save a checkpoint under `folder`."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    layout = LAYOUTS.get(variant, ONE_PROCESS)
    crew(layout.world)(_save, str(folder), variant, layout)
    return folder / "run" / "checkpoints" / "step-2"


def _save(folder: str, variant: str, layout: Layout) -> None:
    """Train two steps and save a checkpoint, on each worker process."""
    from opt_parallel.checkpoint.store import Store
    from opt_parallel.config.model import Activation
    from opt_parallel.config.run import RunConfig
    from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.runtime.clock import Clock

    model = dict(VARIANTS[variant])
    if "activation_function" in model:
        model["activation_function"] = Activation(model["activation_function"])
    # The learning rate is large, so that biases and LayerNorm weights differ clearly from 0 and 1 after the steps.
    run = dataclasses.replace(
        run_for(layout, model, steps=2, lr=0.05, batch=4), run=RunConfig(variant, str(Path(folder) / "run"))
    )
    tokenizer = Path(folder) / "tokenizer"
    with Topology.open(run.parallel.tensor) as topology:
        if topology.is_main:  # the tokenizer is written before the steps, so that it exists on all ranks after them
            texts = [f"Sentence {number} of a made-up text." for number in range(50)]
            save_tokenizer(train_tokenizer(texts, run.model.vocab_size), tokenizer)
        engine, clock = Engine.build(run, topology, random_source(run.seed)), Clock()
        for step in range(run.steps):
            batches = micro_batches(run, step, topology.data.rank, topology.data.size)
            result = engine.step(batches, clock)
            clock = clock.after(run.global_batch, result.tokens)
        store = Store(run, topology, tokenizer)
        store.save(engine, clock)
        store.finish()
        engine.close()


def tampered(export: Path, copy: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy an exported folder with one weight file, and change the tensors in the copy."""
    shutil.copytree(export, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def random_ids(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
