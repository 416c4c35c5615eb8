"""The arguments of `opt-parallel benchmark`."""

from __future__ import annotations

import argparse
from pathlib import Path

from opt_parallel.runtime.machine import cpus

OTHERS = ("transformers", "autotp", "dtensor")
NAMES = ("ours", "whole", *OTHERS)
AUTO = "auto (default): bf16 if this device supports it natively, else fp32"


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each measurement."""
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_training(verbs)
    _add_files(verbs)
    _add_text(verbs)
    _add_memory(verbs)
    _add_plans(verbs)


def _add_training(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = verbs.add_parser(
        "train", help="compare the speed of training with transformers, DeepSpeed AutoTP and torch DTensor"
    )
    train.add_argument("--processes", type=_positive, default=1)
    train.add_argument("--threads", type=_positive, help="threads of each process; default: CPU cores / processes")
    train.add_argument(
        "--contenders",
        type=_names,
        default=["ours", *OTHERS],
        help=f"default: ours,{','.join(OTHERS)}; whole is ours with parallel.sequence=false",
    )
    train.add_argument("--rounds", type=_positive, default=5)
    train.add_argument(
        "--steps", type=_positive, default=2, help="number of optimizer steps of each trainer in a round"
    )
    train.add_argument("--accumulation", type=_positive, default=1, help="number of micro-batches in a step")
    train.add_argument("--name", help="name of the result files; default: date and time")
    train.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    train.add_argument("overrides", nargs="*", metavar="key=value")
    loss = verbs.add_parser("loss", help="measure the loss of the output projection, fused and plain")
    loss.add_argument("--tokens", type=_positive, nargs="+", default=[1024])
    loss.add_argument("--width", type=_positive, default=768)
    loss.add_argument("--words", type=_positive, nargs="+", default=[50272])
    loss.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=AUTO)
    loss.add_argument("--threads", type=_positive, default=1)
    loss.add_argument("--rounds", type=_positive, default=7)
    host = verbs.add_parser("host", help="measure the CPU time to start the operations of a decoder layer")
    host.add_argument("--tensor", type=_positive, default=2, help="tensor-parallel degree")
    host.add_argument("--rounds", type=_positive, default=20)
    collectives = verbs.add_parser("collectives", help="measure the time that collectives take on the host")
    collectives.add_argument("--rounds", type=_positive, default=7)
    ranks = verbs.add_parser("ranks", help="measure the time and the sockets that it takes to connect ranks")
    ranks.add_argument("--processes", type=_positive, nargs="+", default=[2, 4, 8])
    ranks.add_argument("--tensor", type=_positive, default=2, help="tensor-parallel degree")


def _add_files(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    io = verbs.add_parser("io", help="measure memory and time of importing and exporting a checkpoint")
    io.add_argument("--max-shard-size", default="1GB")
    io.add_argument("overrides", nargs="*", metavar="key=value")
    convert = verbs.add_parser("convert", help="compare the export of a checkpoint with copying its files")
    convert.add_argument("--checkpoint", type=Path, required=True, help="a metaseq or Hugging Face folder")
    convert.add_argument("--rounds", type=_positive, default=5)
    convert.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder on the measured disk")
    checkpoint = verbs.add_parser(
        "checkpoint", help="compare the speed of saving and loading checkpoints with DeepSpeed"
    )
    checkpoint.add_argument("--processes", type=_positive, default=4, help="number of processes with one thread each")
    checkpoint.add_argument("--rounds", type=_positive, default=5)
    checkpoint.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder on the measured disk")
    checkpoint.add_argument("overrides", nargs="*", metavar="key=value", help="parallel.tensor=2 unless given")
    resume = verbs.add_parser(
        "resume", help="measure how one of many ranks finds its part of a checkpoint, whose values are made up"
    )
    resume.add_argument("--processes", type=_positive, default=1024, help="number of ranks that save and resume")
    resume.add_argument(
        "--tensor", type=_positive, action="append", help="tensor degree of the resumed run; default: as saved"
    )
    resume.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the checkpoint")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="parallel.tensor is the saved run's")


def _add_text(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = verbs.add_parser("generate", help="compare the speed of greedy generation in fp32 with transformers")
    generate.add_argument(
        "--batch", type=_positive, action="append", help="number of prompts in a batch; default: 1, then 8"
    )
    generate.add_argument("--prompt", type=_positive, default=16, help="number of tokens in a prompt")
    generate.add_argument("--new", type=_positive, default=128, help="number of tokens to generate")
    generate.add_argument("--threads", type=_positive, default=cpus())
    generate.add_argument("--rounds", type=_positive, default=7)
    generate.add_argument("overrides", nargs="*", metavar="key=value")
    prepare = verbs.add_parser(
        "prepare", help="compare the preparation of text with datasets.map, and resume a killed preparation"
    )
    prepare.add_argument(
        "--megabytes",
        type=_positive,
        default=500,
        help="size of the text, which is made of changed copies of a short text",
    )
    prepare.add_argument("--workers", type=_positive, default=2)
    prepare.add_argument("--vocab-size", type=_positive, default=16384)
    prepare.add_argument("--rounds", type=_positive, default=3)
    prepare.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder on the measured disk")


def _add_memory(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    memory = verbs.add_parser(
        "memory", help="trace the memory and the collectives of a micro-batch on one GPU, without a GPU"
    )
    memory.add_argument("--page", type=Path, help="write the table of the published sizes to this page")
    memory.add_argument(
        "overrides", nargs="*", metavar="key=value", help="several values, separated by commas, are traced in turn"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of at least 1")
    return int(text)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} does not exist: choose from {','.join(NAMES)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text} names a trainer twice: name each once")
    return names


def _add_plans(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = verbs.add_parser("plan", help="compare planned and measured step times of four shapes on this CPU")
    auto = verbs.add_parser("auto", help="compare the settings that auto chooses on this CPU with five others")
    auto.add_argument("--processes", type=_positive, default=2)
    auto.add_argument("--batch", type=_positive, default=8, help="sequences of an optimizer step")
    for verb in (plan, auto):
        verb.add_argument("--threads", type=_positive, help="threads of each process; default: CPU cores / processes")
        verb.add_argument("--rounds", type=_positive, default=3)
        verb.add_argument("--steps", type=_positive, default=1, help="number of optimizer steps in a round")
    auto.add_argument("overrides", nargs="*", metavar="key=value")
