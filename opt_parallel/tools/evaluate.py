"""Evaluate a checkpoint on held-out text without an optimizer, on any grid of processes."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import nn

from opt_parallel.checkpoint.memory import PRECISIONS, RUN, choose_dtype
from opt_parallel.checkpoint.sources import Opened, open_checkpoint
from opt_parallel.config.model import Labels, ProblemType, require
from opt_parallel.config.run import Precision, Run
from opt_parallel.data.prepare import Prepared, prepare_validation
from opt_parallel.data.tasks import open_validation
from opt_parallel.parallel.topology import DTYPES, Topology
from opt_parallel.report.plots import draw_confusion, perplexity_of
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.atomic import write_text
from opt_parallel.validation import Untrained, Validation, validate

RESULT = "evaluation.json"


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluate the checkpoint `run.init_from` on `run.data.validation` in the run's precision, and write the result to
    evaluation.json in `run.dir`.

    Returns the loss, with the perplexity and the number of tokens, or with a classifier's metrics. Raises:
    UserError."""
    require(run.init_from is not None, "init_from is not set: name the checkpoint to evaluate")
    opened = open_checkpoint(str(run.init_from), "init_from=", checksums=True)
    opened.check_md5("init_md5=", run.init_md5)
    _check(run, opened)
    data = prepare_validation(run)
    if data.labels:
        opened.check_labels(data.labels)
    samples = open_validation(run, data)
    assert samples is not None
    with Topology.open(run.parallel.tensor, run.parallel.allow_cross_node) as topology:
        run = _in_precision(run, opened, topology)
        model = _model(opened, data.labels, topology, DTYPES[run.precision.name])
        if names := sorted({name for named in topology.exchange(opened.not_finite) for name in named}):
            raise UserError(
                f"init_from={run.init_from} has values that are not finite, in {', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}: evaluate an earlier checkpoint",
                shared=True,
            )
        found = validate(Untrained(run, topology, model), samples, data.labels)
        if not math.isfinite(found.loss):
            raise UserError(
                f"init_from={run.init_from} has no finite loss on data.validation={run.data.validation} in "
                f"precision={run.precision.name.value} ({found.loss}): try precision=fp32, or an earlier checkpoint",
                shared=True,
            )
        result = _result(run, data, found)
        if topology.is_main:
            _write(run, result, data.labels, found)
    return result


def _check(run: Run, opened: Opened) -> None:
    """Raise UserError unless the checkpoint fits the task and its labels have names. Call this function before the text
    is prepared."""
    require(
        run.model.vocab_size == opened.config.vocab_size,
        f"model.vocab_size={run.model.vocab_size}, but init_from={run.init_from} has {opened.config.vocab_size}: leave "
        "model.vocab_size out, since only training adds rows to an embedding",
    )
    if not run.task.name.classifies:
        opened.check_language_model()
        return
    if not opened.is_classifier:
        raise UserError(f"init_from={run.init_from} is a language model and has no labels: leave task=classify out")
    opened.check_classifier()
    names = opened.labels.names
    require(
        run.task.labels is not None or run.task.problem_type is ProblemType.regression,
        f"init_from={run.init_from} has no names for its {len(names)} labels: set task.labels to the names",
    )


def _in_precision(run: Run, opened: Opened, topology: Topology) -> Run:
    """`run` with `precision=auto` replaced by the precision of the checkpoint. Raises: UserError on every rank if
    memory does not suffice."""
    asked = None if run.precision.name is Precision.auto else DTYPES[run.precision.name]
    # The approximate number of activation values per token in a layer.
    width = 8 * opened.config.hidden_size + 2 * opened.config.ffn_dim
    dtype = choose_dtype(opened, topology, asked, RUN, run.micro_batch * run.data.sequence_length * width)
    return run.in_precision(PRECISIONS[dtype])


def _model(opened: Opened, labels: Labels | None, topology: Topology, dtype: torch.dtype) -> nn.Module:
    group, device = topology.tensor, topology.device
    if labels is None:
        return opened.model(group, device, dtype)
    return opened.classifier(len(labels.names), group, device, dtype)


def _result(run: Run, data: Prepared, found: Validation) -> dict[str, Any]:
    inputs = {"checkpoint": run.init_from, "validation": run.data.validation, "precision": run.precision.name.value}
    if data.labels is None:
        return {**inputs, "loss": found.loss, "perplexity": perplexity_of(found.loss), "tokens": found.targets}
    return {**inputs, "loss": found.loss, **found.figures, "examples": found.targets}


def _write(run: Run, result: dict[str, Any], labels: Labels | None, found: Validation) -> None:
    """Write the result, and for a classifier the confusion matrix as numbers and as a plot."""
    if labels is not None and found.confusion is not None:
        result = {**result, "labels": labels.names, "confusion": found.confusion.astype(int).tolist()}
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / RESULT, json.dumps(result, indent=1) + "\n")
        if labels is not None and found.confusion is not None:
            draw_confusion(run.folder / "confusion.png", str(run.init_from), labels.names, found.confusion)
    except OSError as error:
        raise UserError(f"run.dir={run.folder} cannot be written ({error.strerror}): choose another folder") from error
