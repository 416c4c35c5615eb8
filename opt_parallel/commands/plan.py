"""Plan a run on a cluster before it is rented: `opt-parallel plan model=opt-30b cluster=h100-80gb cluster.nodes=16 …`.

Arguments that begin with `cluster` choose a file of configs/cluster/ and set its keys. rehearse=true also runs a step
of the real network on fake CUDA tensors. All other arguments are keys of `train`. The value auto of parallel.tensor,
zero.stage, batch.micro or activation_checkpointing chooses the fastest that fits.

    opt-parallel plan model=opt-6.7b cluster=a100-80gb batch.global=512 parallel.tensor=auto batch.micro=auto
    opt-parallel plan model=opt-30b cluster.nodes=16 parallel.tensor=8 batch.global=1024 --picture plan.png
    opt-parallel plan model=opt-175b cluster.nodes=128 parallel.tensor=8 zero.stage=2 batch.global=1024 rehearse=true
    opt-parallel plan validate rows.csv
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from opt_parallel.checkpoint.inherit import start_from_checkpoint
from opt_parallel.checkpoint.manifest import MANIFEST
from opt_parallel.config.compose import CONFIGS, TEXTS, one_line_errors, register_schema, run_from
from opt_parallel.config.model import require
from opt_parallel.config.options import parsed
from opt_parallel.config.overrides import AUTO, PLANNED, checked
from opt_parallel.config.run import Run
from opt_parallel.config.values import check_values
from opt_parallel.huggingface.hub import find_checkpoint, weights_of
from opt_parallel.metaseq.files import is_metaseq
from opt_parallel.metaseq.folder import describe
from opt_parallel.planning.choice import Choice, choose
from opt_parallel.planning.compose import keys_from
from opt_parallel.planning.loading import loading
from opt_parallel.planning.plan import Plan, plan_of
from opt_parallel.planning.reliability import reliability
from opt_parallel.planning.settings import ClusterConfig, PlanKeys
from opt_parallel.planning.text import VALIDATION, report, text


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--picture", type=Path, help="also draw memory and scaling to this file (png, svg, pdf)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of train, cluster and rehearse")
    return parser


def validation_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opt-parallel plan validate", description="compare plans with measurements")
    parser.add_argument(
        "file", type=Path, help="a CSV file of measurements, with the columns of docs/planning-formulas.md"
    )
    parser.add_argument("--json", type=Path, help="also write the compared quantities to this file")
    return parser


def run() -> None:
    with one_line_errors():
        main()


def main() -> None:
    if sys.argv[1:2] == ["validate"]:
        from opt_parallel.planning.validate import report as validated

        del sys.argv[1]
        arguments = parsed(validation_parser())
        print(validated(arguments.file, arguments.json))
    else:
        arguments = parsed(parser())
        plan_run(arguments.overrides, arguments.json, arguments.picture)


def plan_run(overrides: list[str], as_json: bool, picture: Path | None) -> None:
    """Compose, plan and print a run."""
    ours, theirs, free = split_overrides(overrides)
    config, planned = composed(checked(ours, {"cluster"}), checked(theirs, TEXTS))
    cluster = measured(config.cluster)
    plan, choice = planned_on(planned, cluster, free)
    failures, stored = reliability(plan, cluster), stored_bytes(plan.run.init_from)
    read = loading(plan, cluster, stored) if stored else None
    if as_json:
        print(json.dumps(report(plan, choice, failures, VALIDATION, read), indent=1))
    else:
        print(text(plan, choice, free, failures, VALIDATION, read))
    if picture is not None:
        from opt_parallel.planning.picture import draw

        draw(picture, plan)
    if config.rehearse:
        rehearse(plan)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The overrides of the plan, those of `train`, and the keys whose value is auto."""
    ours, theirs, free = [], [], []
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        if key in PLANNED and value == AUTO:
            free.append(key)
        elif key in ("cluster", "rehearse") or key.startswith("cluster."):
            ours.append(argument)
        else:
            theirs.append(argument)
    return ours, theirs, free


def composed(ours: list[str], theirs: list[str]) -> tuple[PlanKeys, Run]:
    """The plan's own settings and the run."""
    config = keys_from(ours)
    register_schema()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        full = compose("config", theirs, return_hydra_config=True)
        HydraConfig.instance().set_config(full)  # the default of run.name reads the model's name from HydraConfig
        with open_dict(full):
            del full["hydra"]
        check_values(OmegaConf.to_container(full))
        start_from_checkpoint(full, theirs)
        return config, run_from(full)


def stored_bytes(init_from: str | None) -> int:
    """The bytes of the weights in a metaseq checkpoint or a Hugging Face folder.

    The result is 0 for random weights, and for a training checkpoint, whose files also hold the optimizer's state."""
    if init_from is None:
        return 0
    folder = find_checkpoint(init_from, "init_from=")
    if (folder / MANIFEST).is_file():
        return 0
    if is_metaseq(folder):
        return describe(folder).nbytes
    return sum(path.stat().st_size for each in weights_of(os.listdir(folder)) for path in folder.glob(each))


def measured(config: ClusterConfig) -> ClusterConfig:
    """The cluster with measured values in place of the zeros of the cluster `cpu`."""
    if not config.cpu:
        return config
    from opt_parallel.benchmarks.cpu import measure  # imports torch

    return measure(config)


def planned_on(run: Run, config: ClusterConfig, free: list[str]) -> tuple[Plan, Choice | None]:
    """The plan of a run on a cluster, with the choice of its `free` keys. Raises: UserError."""
    cluster = config.cluster()
    require(
        cluster.device.peak["fp32" if run.precision.name.value == "fp32" else "bf16"] > 0,
        f"cluster.device={cluster.device.name} has no rate for precision={run.precision.name.value}: set cluster.bf16 "
        "or cluster.fp32",
    )
    if free:
        choice = choose(run, cluster, free)
        return choice.best, choice
    check_layout(run, config)
    return plan_of(run, cluster), None


def check_layout(run: Run, config: ClusterConfig) -> None:
    """Raise UserError unless the run's grid and batch fit the devices of the cluster."""
    tensor = run.parallel.tensor
    require(
        config.devices % tensor == 0,
        f"cluster.nodes={config.nodes} × cluster.gpus={config.gpus} = {config.devices} devices are not a multiple of "
        f"parallel.tensor={tensor}: choose a tensor degree that divides them, or parallel.tensor={AUTO}",
    )
    require(
        config.nodes == 1 or config.gpus % tensor == 0 or run.parallel.allow_cross_node,
        f"parallel.tensor={tensor} on cluster.gpus={config.gpus} per host: a tensor group would span hosts; choose a "
        "tensor degree that divides cluster.gpus, or set parallel.allow_cross_node=true",
    )
    run.check_world(config.devices)


def rehearse(plan: Plan) -> None:
    """Rehearse a step of the plan's run, and print what it showed beside the plan."""
    from opt_parallel.benchmarks.runs import in_bf16
    from opt_parallel.rehearsal.report import text as rehearsed

    print("\n" + rehearsed(in_bf16(plan.run), plan.cluster.devices))
