"""The trainers that the benchmark compares. Each trainer is a function that does one optimizer step.

All trainers use the run's model, precision, sequence length, batch, dropout, clipping, token ids and AdamW with torch's
fused kernel. All other settings are each trainer's defaults, such as DeepSpeed's bucket sizes and gradient dtypes, and
DTensor's fp32 weights under autocast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opt_parallel.config.optimizer import StateDtype
from opt_parallel.config.run import Precision, Run
from opt_parallel.data.samples.samples import Batch
from opt_parallel.parallel.topology import DTYPES, local_device
from opt_parallel.runtime.clock import Clock

Step = Callable[[int], float]  # maps a step's number to its loss on this rank
PRODUCTS, PRODUCT_SIZE = 20, {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Contender:
    """A trainer to compare. `tensor` is true if the trainer splits the model over `parallel.tensor` processes.
    If `tensor` is false, all processes are data-parallel.

    `refuses(run, world)` returns the reason why the trainer cannot train `run`, or an empty text."""

    title: str
    tensor: bool
    build: Callable[[Run], Step]
    refuses: Callable[[Run, int], str] = lambda run, world: ""

    def layout(self, run: Run, world: int) -> tuple[int, int]:
        """The tensor-parallel and the data-parallel degree on `world` processes."""
        tensor = run.parallel.tensor if self.tensor else 1
        return tensor, world // tensor


def micro_batches(run: Run, step: int, data_rank: int, data_size: int) -> Iterator[Batch]:
    """The micro-batches of a step for one data rank, with random token ids."""
    micro, length = run.micro_batch, run.data.sequence_length
    for position in range(run.global_batch // (micro * data_size)):
        first = step * run.global_batch + (position * data_size + data_rank) * micro
        samples = torch.arange(first, first + micro)
        generator = torch.Generator().manual_seed(first)
        ids = torch.randint(4, run.model.vocab_size, (micro, length + 1), generator=generator)
        yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, None, samples)


def build_ours(run: Run) -> Step:
    from opt_parallel.engine import Engine
    from opt_parallel.parallel.shard import random_source
    from opt_parallel.parallel.topology import Topology

    opened = contextlib.ExitStack()
    topology = opened.enter_context(Topology.open(run.parallel.tensor))
    engine = Engine.build(run, topology, random_source(run.seed))

    def step(number: int) -> float:
        batches = list(micro_batches(run, number, topology.data.rank, topology.data.size))
        return float(engine.step(batches, Clock(number)).loss)

    step.opened = opened  # type: ignore[attr-defined]  # the topology lives as long as the step
    return step


def build_whole(run: Run) -> Step:
    """The optimizer step without sequence parallelism."""
    return build_ours(dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, sequence=False)))


def adamw(run: Run, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    settings = run.optimizer
    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(
        groups, settings.lr, betas, settings.eps, weight_decay=settings.weight_decay, fused=True
    )  # fmt: skip


def transformers_model(run: Run) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    shape = run.model
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            ffn_dim=shape.ffn_dim,
            max_position_embeddings=shape.max_position_embeddings,
            word_embed_proj_dim=shape.embedding_size,
            do_layer_norm_before=shape.do_layer_norm_before,
            activation_function=shape.activation_function.value,
            dropout=shape.dropout,
            attention_dropout=shape.attention_dropout,
            layerdrop=shape.layerdrop,
            init_std=shape.std,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


def build_with_deepspeed(run: Run, autotp: bool) -> Step:
    """The optimizer step of transformers' model under DeepSpeed, with or without AutoTP."""
    import deepspeed

    world, rank = dist.get_world_size(), dist.get_rank()
    tensor = run.parallel.tensor if autotp else 1
    data_rank, data_size = rank // tensor, world // tensor
    dtype = DTYPES[run.precision.name]
    model = transformers_model(run).to(dtype)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": run.global_batch // (run.micro_batch * data_size),
        "gradient_clipping": run.optimizer.clip,
        "bf16": {"enabled": run.precision.name is Precision.bf16},
        "zero_optimization": {"stage": run.zero.stage},
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in our engine, use gloo on a CPU
    if autotp:
        settings["tensor_parallel"] = {"autotp_size": tensor}
        deepspeed.tp_model_init(model, tensor, dtype)
    optimizer = adamw(run, [{"params": list(model.parameters())}])
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)

    def step(number: int) -> float:
        losses = []
        for batch in micro_batches(run, number, data_rank, data_size):
            labels = batch.labels.to(engine.device)
            loss = engine(input_ids=batch.ids.to(engine.device), labels=labels, shift_labels=labels).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    return step


def build_dtensor(run: Run) -> Step:
    """The optimizer step of transformers' model under torch's DTensor tensor parallelism. The embedding and the output
    projection are split along the vocabulary."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    device = local_device()
    mesh = init_device_mesh(device.type, (run.parallel.tensor,))
    model = transformers_model(run).to(device)
    for layer in model.model.decoder.layers:
        plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel(), "self_attn.out_proj": RowwiseParallel()}
        plan |= {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        parallelize_module(layer, mesh, plan)
        layer.self_attn.num_heads //= run.parallel.tensor
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    embedding = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, {"model.decoder.embed_tokens": embedding, "lm_head": head})
    model.lm_head.weight = model.model.decoder.embed_tokens.weight
    split = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    replicated = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    optimizer = adamw(run, [{"params": split}, {"params": replicated}])
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=run.precision.name is Precision.bf16)

    def step(number: int) -> float:
        batches = list(micro_batches(run, number, 0, 1))
        losses: list[Tensor] = []
        for batch in batches:
            ids, labels = batch.ids.to(device), batch.labels.to(device)
            with loss_parallel():
                with mixed:
                    logits = model(input_ids=ids).logits
                loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
                (loss / len(batches)).backward()
            losses.append(loss.detach())
        if run.optimizer.clip > 0:
            clip_apart(split, replicated, run.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).mean())

    return step


def clip_apart(split: Sequence[Tensor], replicated: Sequence[Tensor], most: float) -> None:
    """Clip the gradients of DTensors and tensors by their common norm. torch's own function cannot mix both types."""
    from torch.distributed.tensor import DTensor

    split_norm, replicated_norm = (
        torch.nn.utils.get_total_norm([each.grad for each in group if each.grad is not None])
        for group in (split, replicated)
    )  # fmt: skip
    assert isinstance(split_norm, DTensor)
    norm = (split_norm.full_tensor() ** 2 + replicated_norm**2) ** 0.5
    for group in (split, replicated):
        torch.nn.utils.clip_grads_with_norm_(group, most, norm)


def build_product(run: Run) -> Step:
    """An upper bound for the trainers, whose step is PRODUCTS large matrix products."""
    device, dtype = local_device(), DTYPES[run.precision.name]
    size = PRODUCT_SIZE[device.type]
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def step(number: int) -> float:
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)
        return 0.0

    return step


def _whole_refuses(run: Run, world: int) -> str:
    return "needs parallel.tensor > 1" if run.parallel.tensor == 1 else ""


def _others_refuse(run: Run, world: int) -> str:
    return "is timed with fp32 moments only" if run.optimizer.state_dtype is StateDtype.bf16 else ""


def _autotp_refuses(run: Run, world: int) -> str:
    if run.parallel.tensor == 1:
        return "needs parallel.tensor > 1"
    return "stops at ZeRO-2" if run.zero.stage == 3 else _others_refuse(run, world)


def _dtensor_refuses(run: Run, world: int) -> str:
    if run.parallel.tensor == 1:
        return "needs parallel.tensor > 1"
    if run.parallel.tensor != world:
        return "has no ZeRO, so it needs data-parallel degree 1"
    return _others_refuse(run, world)


CONTENDERS = {
    "ours": Contender("opt-parallel", True, build_ours),
    "whole": Contender("opt-parallel, sequence=false", True, build_whole, _whole_refuses),
    "transformers": Contender(
        "transformers + DeepSpeed", False, lambda run: build_with_deepspeed(run, autotp=False), _others_refuse
    ),
    "autotp": Contender(
        "DeepSpeed AutoTP", True, lambda run: build_with_deepspeed(run, autotp=True), _autotp_refuses
    ),
    "dtensor": Contender("torch DTensor", True, build_dtensor, _dtensor_refuses),
}  # fmt: skip
PRODUCT = Contender("a matrix product", True, build_product)
