"""The network that a run trains, on the meta device: what `fill` then gives memory and values."""

from __future__ import annotations

import torch

from opt_parallel.config import Run
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.shapes import Labels
from opt_parallel.task_config import Task
from opt_parallel.topology import Group


def network(run: Run, labels: Labels | None, group: Group) -> CausalLM | SequenceClassifier:
    """A language model, or a classifier that tells `labels` apart."""
    with torch.device("meta"):
        if run.task.name is not Task.classify:
            return CausalLM(run.model, group, run.activation_checkpointing)
        assert labels is not None
        number, problem_type = len(labels.names), labels.problem_type
        return SequenceClassifier(run.model, number, group, run.activation_checkpointing, problem_type)
