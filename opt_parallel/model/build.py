"""The network that a run trains, on the meta device: what `fill` then gives memory and values.

What LoRA freezes is frozen here already, before anybody asks what there is to train."""

from __future__ import annotations

import torch

from opt_parallel.config.model import Labels
from opt_parallel.config.run import Run
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.lora import adapt
from opt_parallel.parallel.topology import Group


def network(run: Run, labels: Labels | None, group: Group) -> CausalLM | SequenceClassifier:
    """A language model, or a classifier that tells `labels` apart; with low-rank terms where the run has them."""
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
