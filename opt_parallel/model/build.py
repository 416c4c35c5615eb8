"""Builds the network that a run trains, on the meta device. `fill` allocates its parameters and reads their values.

With LoRA, the frozen parameters are frozen in this step, before other code asks which parameters are trained."""

from __future__ import annotations

import torch

from opt_parallel.config.model import Labels, ModelConfig
from opt_parallel.config.run import ActivationCheckpointing
from opt_parallel.config.task import LoraConfig
from opt_parallel.model.heads import CausalLM, SequenceClassifier
from opt_parallel.model.lora import adapt
from opt_parallel.parallel.topology import Group


def network(
    model: ModelConfig,
    lora: LoraConfig,
    labels: Labels | None,
    group: Group,
    recompute: ActivationCheckpointing = ActivationCheckpointing.none,
    sequence: bool = False,
) -> CausalLM | SequenceClassifier:
    """A language model, or a classifier if `labels` are given. LoRA terms are added if the rank of `lora` is not 0."""
    built: CausalLM | SequenceClassifier
    with torch.device("meta"):
        if labels is not None:
            built = SequenceClassifier(model, len(labels.names), group, recompute, labels.problem_type, sequence)
        else:
            built = CausalLM(model, group, recompute, sequence)
        if lora.rank > 0:
            adapt(built, lora)
    return built
