"""The runs that benchmarks measure, composed from the keys of `train`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from opt_parallel.config.run import ActivationCheckpointing, Precision, Run
from opt_parallel.runtime.errors import UserError, reporting

PUBLISHED = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")


def composed(overrides: list[str]) -> Run:
    """The run that `train` composes from `overrides`, without warm-up."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from opt_parallel.config.compose import CONFIGS, explain, register_schema, run_from

    if any(override.startswith("batch.global") for override in overrides):
        raise UserError("batch.global follows from batch.micro × --accumulation × data: set those instead")
    register_schema()
    ours = ["run.name=benchmark", "schedule.warmup_steps=null", "schedule.warmup_tokens=null"]
    composing = initialize_config_dir(str(CONFIGS), version_base="1.3")
    with reporting((HydraException, OmegaConfBaseException), explain), composing:
        return run_from(compose("config", overrides=[*overrides, *ours]))


def in_bf16(run: Run) -> Run:
    """The run with precision=auto replaced by bf16, which GPUs support."""
    return run.in_precision(Precision.bf16) if run.precision.name is Precision.auto else run


def published(overrides: list[str]) -> Iterator[tuple[str, Run]]:
    """The published sizes by name, in bf16, with the tensor degrees of their paper configurations, without and with
    sequence parallelism, and with each kind of recomputation."""
    for size in PUBLISHED:
        paper = [f"experiment=opt-{size}-paper", "batch.micro=1", *overrides]
        for sequence in ("false", "true") if composed(paper).parallel.tensor > 1 else ("false",):
            for kind in ActivationCheckpointing:
                settings = [*paper, f"parallel.sequence={sequence}", f"activation_checkpointing={kind.value}"]
                yield size, composed(settings).in_precision(Precision.bf16)


def combinations(overrides: list[str]) -> list[list[str]]:
    """Every combination of the values of `overrides`, where a key has one value or several values with commas."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from opt_parallel.config.compose import explain

    with reporting((HydraException,), explain):
        parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_discrete_sweep()
        else [str(one.input_line)]
        for one in parsed
    ]
    return [list(combination) for combination in itertools.product(*choices)]
