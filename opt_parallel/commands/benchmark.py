"""Measure opt-parallel and other trainers in one run.

    opt-parallel benchmark train --processes 2 model=opt-125m parallel.tensor=2 batch.micro=2
    opt-parallel benchmark loss --tokens 1024 4096 --words 25136
    opt-parallel benchmark host --tensor 2
    opt-parallel benchmark collectives
    opt-parallel benchmark ranks --processes 2 4 8 16 32
    opt-parallel benchmark io model=opt-1.3b parallel.tensor=2 precision=bf16
    opt-parallel benchmark convert --checkpoint FOLDER
    opt-parallel benchmark checkpoint precision=fp32
    opt-parallel benchmark resume --processes 1024 --tensor 8 --tensor 4 model=opt-175b parallel.tensor=8
    opt-parallel benchmark generate --batch 1 --batch 8 model=opt-125m
    opt-parallel benchmark prepare --megabytes 500 --workers 2
    opt-parallel benchmark plan --rounds 5
    opt-parallel benchmark auto --processes 2 --batch 4 model.num_hidden_layers=4 data.sequence_length=256
    opt-parallel benchmark memory model=opt-13b,opt-175b parallel.tensor=8 activation_checkpointing=none,full

The commands `train`, `io`, `checkpoint`, `resume`, `generate`, `auto` and `memory` take configuration keys of `train`
after their options.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from importlib.util import find_spec

from opt_parallel.benchmarks.arguments import OTHERS, add_verbs
from opt_parallel.benchmarks.runs import combinations, composed, in_bf16, published
from opt_parallel.config.options import parsed
from opt_parallel.config.paths import make_folder, reach
from opt_parallel.config.run import ActivationCheckpointing, Offload, Precision, PrecisionConfig, Run
from opt_parallel.config.units import bytes_of
from opt_parallel.runtime.errors import UserError, reporting
from opt_parallel.runtime.log import aligned, quiet_libraries
from opt_parallel.runtime.machine import cpu_model, cpus


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_verbs(result)
    return result


def main() -> None:
    arguments = parsed(parser())
    quiet_libraries()
    runners = {
        "train": run_race, "loss": run_loss, "host": run_host, "collectives": run_collectives,
        "ranks": run_ranks, "io": run_io, "checkpoint": run_checkpoint, "resume": run_resume,
        "generate": run_generation, "prepare": run_preparation, "memory": run_memory, "convert": run_conversion,
        "plan": run_plan, "auto": run_auto,
    }  # fmt: skip
    runners[arguments.verb](arguments)


def run_race(arguments: argparse.Namespace) -> None:
    world, threads = arguments.processes, arguments.threads or max(1, cpus() // arguments.processes)
    run = settled(compared_run(arguments.overrides, arguments.accumulation))
    check_setting(arguments, run)
    if set(arguments.contenders) & set(OTHERS):
        check_transformers()
    os.environ["LOCAL_WORLD_SIZE"] = str(world)

    import torch

    from opt_parallel.benchmarks.race import race
    from opt_parallel.benchmarks.report import rows_of, table, write
    from opt_parallel.parallel.topology import local_device

    device = local_device()
    done = race(arguments.contenders, run, world, threads, arguments.steps, arguments.rounds)
    if all(result.failure for result in done.results):
        raise UserError("; ".join(f"{result.title} {result.failure}" for result in done.results))
    rows = rows_of(done, run, world)
    shape, rate = run.model, statistics.median(done.matmul_flops) / 1e12
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_model()}, {threads} threads each"
    title = (
        f"OPT {shape.parameters() / 1e6:,.0f}M ({shape.num_hidden_layers} layers of {shape.hidden_size}), "
        f"{run.precision.name.value}, ZeRO-{run.zero.stage}, micro-batch {run.micro_batch} × {run.data.sequence_length}"
        f"{f' × {arguments.accumulation}' if arguments.accumulation > 1 else ''}, dropout {shape.dropout:g}, "
        f"attention dropout {shape.attention_dropout:g}"
    )
    machine = f"{world} × {where}; a matrix product reaches {rate:.2f} TFLOP/s on each"
    print(f"\n{title}\n{machine}\n\n{table(rows)}\n")
    setting = {
        "title": title, "machine": machine, "overrides": arguments.overrides, "processes": world, "threads": threads,
        "steps": arguments.steps, "accumulation": arguments.accumulation, "torch": torch.__version__,
        "matmul_flops": done.matmul_flops,
    }  # fmt: skip
    name = arguments.name or time.strftime("%Y-%m-%d-%H%M%S")
    print("written: " + ", ".join(str(path) for path in write(arguments.output, name, title, setting, rows)))


def check_transformers() -> None:
    """Raise UserError if transformers, with which the benchmark compares, is not installed."""
    if find_spec("transformers") is None:
        raise UserError("this benchmark compares with transformers, which is not installed: pip install transformers")


def check_setting(arguments: argparse.Namespace, run: Run) -> None:
    """Create the output folder. Raises: UserError if the folder cannot be created, or if parallel.tensor does not
    divide the number of processes."""
    if arguments.processes % run.parallel.tensor:
        raise UserError(f"--processes {arguments.processes} is not a multiple of parallel.tensor={run.parallel.tensor}")
    make_folder("--output ", arguments.output)


def compared_run(overrides: list[str], accumulation: int) -> Run:
    """The run that `train` composes from `overrides`, with one data-parallel process and without warm-up.

    Raises: UserError for settings that would apply to opt-parallel only."""
    run = composed(overrides)
    refused = {
        "activation_checkpointing": (run.activation_checkpointing, ActivationCheckpointing.none),
        "zero.offload": (run.zero.offload, Offload.none),
    }
    for key, (value, only) in refused.items():
        if value is not only:
            raise UserError(f"{key}={value.value} would apply to opt-parallel only: use {key}={only.value}")
    if run.precision.name is Precision.fp16:
        raise UserError("precision=fp16 makes trainers skip different steps: use precision=bf16 or precision=fp32")
    return dataclasses.replace(run, batch={"global": run.micro_batch * accumulation, "micro": run.micro_batch})


def settled(run: Run) -> Run:
    """`run` with precision=auto replaced by bf16 or fp32. bf16 is not chosen on a device that only emulates it."""
    from opt_parallel.parallel.precision import choose_precision_alone

    precision, why = choose_precision_alone(run.precision.name, run.zero.stage)
    if why:
        print(f"precision={precision.value}: {why}")
    return run.in_precision(precision)


def run_loss(arguments: argparse.Namespace) -> None:
    import torch

    from opt_parallel.benchmarks.loss import measure, row
    from opt_parallel.parallel.topology import DTYPES

    torch.set_num_threads(arguments.threads)
    precision = settled(Run(precision=PrecisionConfig(Precision(arguments.precision)))).precision.name
    dtype = DTYPES[precision]
    lines = [
        ["tokens × words", "fused (range)", "plain (range)", "plain ÷ fused (range)", "fused memory", "plain memory"]
    ]
    for tokens in arguments.tokens:
        for words in arguments.words:
            measured = measure(tokens, arguments.width, words, dtype, arguments.rounds)
            lines.append(row(tokens, words, measured))
    print(f"\n{precision.value}, width {arguments.width}, {arguments.threads} threads\n")
    print(aligned(lines))


def run_host(arguments: argparse.Namespace) -> None:
    from opt_parallel.benchmarks.host import HEAD, measure, row

    measured = measure(arguments.tensor, arguments.rounds)
    print(f"\nCPU time of one layer, forward and backward, tensor {arguments.tensor}, dropout 0.1, {cpu_model()}\n")
    print(aligned([HEAD, *(row(variant, times) for variant, times in measured.items())]))


def run_collectives(arguments: argparse.Namespace) -> None:
    from opt_parallel.benchmarks.collectives import measure, table

    print(f"\na fake group, {cpu_model()}\n")
    print(aligned(table(measure(arguments.rounds))))


def run_ranks(arguments: argparse.Namespace) -> None:
    from opt_parallel.benchmarks.ranks import HEAD, measure, row

    for processes in arguments.processes:
        if processes < 2 or processes % arguments.tensor:
            raise UserError(
                f"--processes {processes} must be a multiple of --tensor {arguments.tensor}, and at least 2"
            )
    print(f"\ntensor {arguments.tensor}, {cpu_model()}\n")
    print(aligned([HEAD, *(row(measure(processes, arguments.tensor)) for processes in arguments.processes)]))


def run_io(arguments: argparse.Namespace) -> None:
    run = settled(compared_run(arguments.overrides, accumulation=1))
    from opt_parallel.benchmarks.files import table_of

    size = bytes_of(arguments.max_shard_size, "--max-shard-size ")
    rows = table_of(run.model, run.parallel.tensor, run.precision.name, size)
    print(
        f"\nOPT {run.model.parameters() / 1e6:,.0f}M, fp16 files of {arguments.max_shard_size} at most, imported as "
        f"{run.precision.name.value}; total memory of a process\n"
    )
    print(aligned(rows))


def run_conversion(arguments: argparse.Namespace) -> None:
    make_folder("--output ", arguments.output)
    from opt_parallel.benchmarks.conversion import measure

    print(f"\n{arguments.checkpoint}, {cpu_model()}, {cpus()} CPUs\n")
    print(aligned(measure(arguments.checkpoint, arguments.output, arguments.rounds)))


def run_checkpoint(arguments: argparse.Namespace) -> None:
    run = settled(compared_run(["parallel.tensor=2", *arguments.overrides], accumulation=1))
    check_setting(arguments, run)
    os.environ["OMP_NUM_THREADS"] = "1"  # number of threads of the processes that `measure` starts
    from opt_parallel.benchmarks.checkpoints import measure, table

    measured = measure(run, arguments.processes, arguments.output, arguments.rounds)
    tensor, data = run.parallel.tensor, arguments.processes // run.parallel.tensor
    print(
        f"\nOPT {run.model.parameters() / 1e6:,.0f}M, {run.precision.name.value}, ZeRO-{run.zero.stage}, "
        f"tensor {tensor} × data {data}, {cpu_model()}, 1 thread each\n"
    )
    print(aligned(table(measured)))


def run_resume(arguments: argparse.Namespace) -> None:
    run = compared_run(arguments.overrides, accumulation=1)
    check_setting(arguments, run)
    tensors = arguments.tensor or [run.parallel.tensor]
    for tensor in tensors:
        run.model.check_splits(tensor, "--tensor ")
        if arguments.processes % tensor:
            raise UserError(f"--processes {arguments.processes} is not a multiple of --tensor {tensor}")
    from opt_parallel.benchmarks.resuming import measure

    lines = measure(run, arguments.processes, tensors, arguments.output)
    data = arguments.processes // run.parallel.tensor
    print(
        f"\nOPT {run.model.parameters() / 1e6:,.0f}M, saved by {arguments.processes:,} ranks (tensor "
        f"{run.parallel.tensor} × data {data}) with ZeRO-3, {cpu_model()}\n"
    )
    print(aligned(lines))


def run_generation(arguments: argparse.Namespace) -> None:
    check_transformers()
    import torch

    from opt_parallel.benchmarks.generation import HEAD, measure, row
    from opt_parallel.model.decoding import Decoding, check_fits

    model = compared_run(arguments.overrides, accumulation=1).model
    check_fits(model, Decoding(max_new_tokens=arguments.new), arguments.prompt)
    torch.set_num_threads(arguments.threads)
    lines = [*HEAD]
    for batch in arguments.batch or [1, 8]:
        lines.append(row(batch, measure(model, batch, arguments.prompt, arguments.new, arguments.rounds)))
    print(
        f"\nOPT {model.parameters() / 1e6:,.0f}M, fp32, {arguments.new} tokens after {arguments.prompt}, "
        f"{cpu_model()}, {arguments.threads} threads\n"
    )
    print(aligned(lines))


def run_preparation(arguments: argparse.Namespace) -> None:
    make_folder("--output ", arguments.output)
    from opt_parallel.benchmarks.preparation import measure

    print(f"\n{arguments.megabytes} MB of text, {arguments.workers} workers, {cpu_model()}\n")
    size = arguments.megabytes * 10**6
    print(aligned(measure(arguments.output, size, arguments.workers, arguments.vocab_size, arguments.rounds)))


def run_memory(arguments: argparse.Namespace) -> None:
    if arguments.page is not None:
        if reach("--page ", arguments.page) is None:
            raise UserError(f"--page {arguments.page} does not exist: give the page whose table is to be replaced")
        from opt_parallel.benchmarks.memory import write_page

        write_page(arguments.page, list(published(arguments.overrides)))
        return
    runs = [in_bf16(composed(overrides)) for overrides in combinations(arguments.overrides)]
    from opt_parallel.benchmarks.memory import HEAD, row
    from opt_parallel.rehearsal.trace import traces

    print(aligned([HEAD, *(row(run, trace) for run, trace in zip(runs, traces(runs), strict=True))]))


def run_plan(arguments: argparse.Namespace) -> None:
    from opt_parallel.benchmarks.predicted import SHAPES_HEAD, time_shapes

    threads = arguments.threads or cpus()
    found = time_shapes(threads, arguments.rounds, arguments.steps)
    print(f"\na step of one process in fp32, {cpu_model()}, {threads} threads, {arguments.rounds} rounds\n")
    print(aligned([SHAPES_HEAD, *(timed.row() for timed in found)]))


def run_auto(arguments: argparse.Namespace) -> None:
    processes = arguments.processes
    threads = arguments.threads or max(1, cpus() // processes)
    from opt_parallel.benchmarks.predicted import AUTO_HEAD, time_auto

    run = composed(["precision=fp32", *arguments.overrides])
    if run.precision.name is not Precision.fp32:
        raise UserError(f"precision={run.precision.name.value}: this benchmark measures rates in fp32: leave it out")
    run = dataclasses.replace(run, batch={"global": arguments.batch, "micro": 1})
    rows = time_auto(run, processes, threads, arguments.rounds, arguments.steps)
    print(f"\n{processes} processes of {threads} threads, {cpu_model()}, {arguments.rounds} rounds, auto first\n")
    print(aligned([AUTO_HEAD, *rows]))


def run() -> None:
    with reporting():
        main()
