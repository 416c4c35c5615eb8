"""Export a checkpoint to a Hugging Face folder.

opt-parallel export --checkpoint DIR --output DIR

A checkpoint of a LoRA run is exported with merged weights, or with `--adapter` as a PEFT adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from opt_parallel.config.options import parsed
from opt_parallel.config.output import ExportDtype
from opt_parallel.config.units import bytes_of
from opt_parallel.runtime.errors import UserError, reporting
from opt_parallel.runtime.log import quiet_libraries


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="…/checkpoints/step-<N>, a Hugging Face or metaseq folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="maximum size of a weights file, such as 5GB (default), 500MB or 5GiB"
    )
    dtypes = list(ExportDtype.__members__)
    parser.add_argument(
        "--dtype", default="auto", choices=dtypes, help="dtype of the weights; auto (default): the checkpoint's own"
    )
    parser.add_argument("--md5", type=Path, help="list of MD5 sums with which a metaseq checkpoint is compared first")
    parser.add_argument("--adapter", action="store_true", help="export only the adapter of a LoRA run, for `peft`")
    return parser


def main() -> None:
    arguments = parsed(parser())
    quiet_libraries()
    size = bytes_of(arguments.max_shard_size, "--max-shard-size ")
    from opt_parallel.tools.export import export, export_adapter

    if arguments.adapter and arguments.md5:
        raise UserError(f"--md5 {arguments.md5} is for a metaseq checkpoint, which has no adapter: leave it out")
    if arguments.adapter:
        export_adapter(arguments.checkpoint, arguments.output, ExportDtype(arguments.dtype))
    else:
        export(arguments.checkpoint, arguments.output, size, ExportDtype(arguments.dtype), md5=arguments.md5)
    print(f"exported {arguments.checkpoint} to {arguments.output}")


def run() -> None:
    with reporting():
        main()
