"""Builds the network that a run trains, on the meta device. `fill` allocates its parameters and reads their values.

With LoRA, the frozen parameters are frozen in this step, before other code asks which parameters are trained."""

from __future__ import annotations

import torch

from opt_parallel.config.model import Labels
from opt_parallel.config.run import Run
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.lora import adapt
from opt_parallel.parallel.topology import Group


def network(run: Run, labels: Labels | None, group: Group) -> CausalLM | SequenceClassifier:
    """A language model, or a classifier if `labels` are given. LoRA terms are added if the run's LoRA rank is not 0."""
    model: CausalLM | SequenceClassifier
    with torch.device("meta"):
        if labels is not None:
            number, problem_type = len(labels.names), labels.problem_type
            model = SequenceClassifier(run.model, number, group, run.activation_checkpointing, problem_type)
        else:
            model = CausalLM(run.model, group, run.activation_checkpointing)
        if run.task.lora.rank > 0:
            adapt(model, run.task.lora)
    return model
