"""Runs whose memory is traced without a GPU and measured on one."""

from __future__ import annotations

import dataclasses

from layouts import Layout, run_for

from opt_parallel.config.run import ActivationCheckpointing, Run


def cells() -> dict[str, Run]:
    """Six layers of opt-1.3b's width, with each kind of recomputation."""
    base = Run()
    model = dataclasses.replace(base.model, hidden_size=2048, num_hidden_layers=6, num_attention_heads=32, ffn_dim=8192)
    found = {}
    for kind in ActivationCheckpointing:
        found[kind.value] = dataclasses.replace(
            base, model=model, batch={"global": 4, "micro": 4}, activation_checkpointing=kind,
            precision=run_for(Layout(stage=1, precision="bf16")).precision,
            data=dataclasses.replace(base.data, sequence_length=2048),
        )  # fmt: skip
    return found
