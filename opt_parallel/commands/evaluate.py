"""Evaluate a checkpoint on `data.validation`, by loss and perplexity or by a classifier's metrics. The arguments are
configuration keys of `train`. The command runs as one process or under a launcher.

opt-parallel evaluate init_from=runs/opt-125m/checkpoints/step-1000 data.validation=/data/held-out
torchrun --nproc-per-node 2 -m opt_parallel evaluate init_from=facebook/opt-1.3b parallel.tensor=2 data.validation=…
opt-parallel evaluate init_from=… data.validation=labelled.jsonl           # a classifier

Task, precision and sequence length default to those of the checkpoint. The loss and metrics are printed and written to
evaluation.json in `run.dir`.
"""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opt_parallel.checkpoint.inherit import inherit_for_evaluation, start_from_checkpoint, take_special_tokens
from opt_parallel.config.compose import CONFIGS, command, one_line_errors, run_from
from opt_parallel.runtime.log import say


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def main(config: DictConfig) -> None:
    with one_line_errors():
        inherit_for_evaluation(config, HydraConfig.get().overrides.task)
        start_from_checkpoint(config, HydraConfig.get().overrides.task)
        take_special_tokens(config, HydraConfig.get().overrides.task)
        run = run_from(config)
        from opt_parallel.tools.evaluate import evaluate  # imported late, since torch takes seconds

        for name, value in evaluate(run).items():
            say(f"{name}: {value:,.6g}" if isinstance(value, float) else f"{name}: {value}")


def run() -> None:
    command(main)
