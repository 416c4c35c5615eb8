"""The parts of `make test-gpu` that pytest does not run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from cells import cells
from layouts import Layout, micro_batches, run_for

from opt_parallel.config.run import ActivationCheckpointing, Run
from opt_parallel.engine import Engine
from opt_parallel.parallel import collectives
from opt_parallel.parallel.shard import random_source
from opt_parallel.parallel.topology import Group, Topology
from opt_parallel.runtime.clock import Clock

TRACED = Path(__file__).with_name("traced.json")
# The largest difference of a loss of about 6 to the CPU's. Both devices round each operation to the precision.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}


def runs() -> dict[str, Run]:
    """Tiny runs by name: each ZeRO stage in each precision, and stages 1 and 3 with each kind of recomputation."""
    layouts = [Layout(micro=4)]
    layouts += [Layout(stage=stage, micro=4, precision=name) for stage in (1, 2, 3) for name in ("bf16", "fp16")]
    found = {f"ZeRO-{layout.stage} {layout.precision}": run_for(layout) for layout in layouts}
    for stage in (1, 3):
        for kind in ActivationCheckpointing:
            if kind is not ActivationCheckpointing.none:
                run = run_for(Layout(stage=stage, micro=4, precision="bf16"))
                found[f"ZeRO-{stage} bf16 {kind.value}"] = dataclasses.replace(run, activation_checkpointing=kind)
    return found


def train(run: Run, warm_up: int = 1) -> tuple[list[float], float, int]:
    """The losses of the run, the mean seconds of a step after the warm-up, and the number of times that the host waits
    for a GPU in the last step."""
    with Topology.open(1) as topology, warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        engine = Engine.build(run, topology, random_source(run.seed))
        losses, start = [], 0.0
        for step in range(run.steps):
            batches = micro_batches(run, step, 0, 1)
            if topology.device.type == "cuda":  # as the training loop does
                batches = [batch.pinned() for batch in batches]
            if step == warm_up:
                start = time.perf_counter()
            if topology.device.type == "cuda" and step == run.steps - 1:
                torch.cuda.set_sync_debug_mode("warn")
                waits.clear()
            losses.append(engine.step(batches, Clock(step)).loss)  # a number, so the host waits for the device here
        seconds = (time.perf_counter() - start) / (run.steps - warm_up)
        if topology.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        engine.close()
    return losses, seconds, sum("synchronizing CUDA operation" in str(wait.message) for wait in waits)


def expected_losses(arguments: argparse.Namespace) -> bool:
    """Write the losses on the CPU, one list for each precision, to `--output`. They do not depend on the stage."""
    found: dict[str, list[float]] = {}
    for run in runs().values():
        precision = run.precision.name.value
        if precision not in found:
            found[precision], _, _ = train(run)
            print(f"{precision}: {shown(found[precision])}", flush=True)
    arguments.output.write_text(json.dumps(found))
    return True


def losses(arguments: argparse.Namespace) -> bool:
    """Train each run, and compare the losses with those of the CPU in the file `--expected`."""
    expected = json.loads(arguments.expected.read_text()) if arguments.expected.exists() else {}
    passed = True
    for name, run in runs().items():
        try:
            found, seconds, waits = train(run)
        except Exception:
            traceback.print_exc()
            print(f"FAILED  {name}", flush=True)
            passed = False
            continue
        precision = run.precision.name.value
        if precision not in expected:
            verdict, agrees = "the CPU's losses are missing", False
        else:
            most = max(abs(mine - theirs) for mine, theirs in zip(found, expected[precision], strict=True))
            verdict, agrees = f"CPU {shown(expected[precision])}, differ by {most:.1e}", most <= TOLERANCES[precision]
        failed = not agrees or waits > 1
        passed = passed and not failed
        print(
            f"{name:24}{seconds:8.4f} s a step, {waits} waits, losses {shown(found)}, {verdict}{' FAILED' * failed}",
            flush=True,
        )
    return passed


def shown(values: list[float]) -> str:
    return " ".join(f"{value:.5f}" for value in values)


def machine(arguments: argparse.Namespace) -> bool:
    """Print the versions, and whether the device exists."""
    import deepspeed

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}")
    if arguments.device == "cpu":
        return True
    if not torch.cuda.is_available():
        print("torch finds no GPU")
        return False
    found = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    print(f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}")
    return True


def collective_checks(arguments: argparse.Namespace) -> bool:
    """Every collective in a group of one rank returns what it got. For functions that do not communicate in a group of
    size 1, the group claims to have two ranks."""
    passed = True
    checked: dict[str, Callable[[torch.Tensor, Group], torch.Tensor]] = {
        "all-reduce": collectives.all_reduce,
        "all-reduce in place": lambda tensor, group: collectives.start_all_reduce(tensor.clone(), group)(),
        "broadcast": collectives.broadcast, "copy": collectives.copy, "reduce": collectives.reduce,
        "all-gather": lambda tensor, group: collectives.start_all_gather(tensor, alone(group))()[0],
        "reduce-scatter": lambda tensor, group: collectives.start_reduce_scatter(tensor[None], alone(group))(),
    }  # fmt: skip
    with Topology.open(1) as topology:
        group = Group(topology.world.handle, 0, 2)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensor = torch.arange(2**20, device=topology.device).remainder(97).to(dtype).view(1024, -1)
            for name, collective in checked.items():
                try:
                    same = torch.equal(collective(tensor, group), tensor)
                except Exception:
                    traceback.print_exc()
                    same = False
                passed = passed and same
                print(f"{dtype}, {name}: {'the same values' if same else 'FAILED'}", flush=True)
        topology.set_timeout(60.0)
        print(f"device: {topology.device}, backend: {dist.get_backend_config()}")
        return passed and topology.device.type == arguments.device


def alone(group: Group) -> Group:
    return Group(group.handle, 0, 1)


def memory(arguments: argparse.Namespace) -> bool:
    """Compare the peak of activations and temporary tensors with the traced one, which may differ by 5%."""
    traced, passed = json.loads(TRACED.read_text()), True
    for name, run in cells().items():
        if arguments.device == "cpu":
            print(f"{name}: traced {traced[name] / 2**20:,.0f} MiB, measured only on a GPU")
            continue
        try:
            peak, seconds = measured(run)
        except Exception:
            traceback.print_exc()
            print(f"FAILED  {name}", flush=True)
            passed = False
            continue
        ratio = peak / traced[name]
        within = 0.95 <= ratio <= 1.05
        passed &= within
        print(
            f"{name}: measured {peak / 2**20:,.0f} MiB, traced {traced[name] / 2**20:,.0f} MiB, ratio {ratio:.3f}"
            f"{'' if within else ' FAILED'}, {seconds:.4f} s forward and backward",
            flush=True,
        )
    return passed


def trace(arguments: argparse.Namespace) -> bool:
    """Trace the peaks again, and write them to `traced.json`. This needs a build of torch for CPUs."""
    from opt_parallel.rehearsal.trace import traces

    found = traces(list(cells().values()))
    TRACED.write_text(json.dumps({name: one.peak for name, one in zip(cells(), found, strict=True)}, indent=1) + "\n")
    return True


def measured(run: Run) -> tuple[int, float]:
    """The peak bytes of a forward and backward pass on the GPU above the bytes of the weights, and its seconds."""
    from opt_parallel.model.build import network
    from opt_parallel.parallel.shard import fill
    from opt_parallel.parallel.topology import ALONE, DTYPES
    from opt_parallel.rehearsal.trace import micro_batch_loss, without_gradients

    device = torch.device("cuda", 0)
    model = network(run.model, run.task.lora, None, ALONE, run.activation_checkpointing, run.parallel.sequence)
    fill(model, lambda name, shard: torch.zeros(shard.local_shape), device, DTYPES[run.precision.name])
    without_gradients(model)
    (micro_batch_loss(model, run, device) * 1.0).backward()  # compiles, and allocates the libraries' buffers
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    (micro_batch_loss(model, run, device) * 1.0).backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start


def speed(arguments: argparse.Namespace) -> bool:
    """Print the tokens per second of a whole step of opt-125m, with the recipe's dropout. A CPU trains a tiny model."""
    base = run_for(Layout(stage=1, micro=4, precision="bf16"), steps=8)
    if arguments.device == "cuda":
        base = dataclasses.replace(
            base, model=Run().model, batch={"global": 8, "micro": 8},
            data=dataclasses.replace(base.data, sequence_length=2048),
        )  # fmt: skip
    _, seconds, _ = train(base, warm_up=3)
    size = base.model.parameters() / 1e6
    print(f"OPT {size:,.1f}M, bf16, ZeRO-1: {seconds:.4f} s a step, {base.batch_tokens / seconds:,.0f} tokens/s")
    return True


CHECKS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "machine": machine,
    "expected": expected_losses,
    "losses": losses,
    "collectives": collective_checks,
    "memory": memory,
    "speed": speed,
    "trace": trace,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=sorted(CHECKS))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--expected", type=Path)
    given = parser.parse_args()
    sys.exit(0 if CHECKS[given.check](given) else 1)
