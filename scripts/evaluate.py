"""Loss and perplexity of a checkpoint, or a classifier's figures, on `data.validation`: Hydra's command line as of
train.py, alone or under a launcher.

python scripts/evaluate.py init_from=runs/opt-125m/checkpoints/step-1000 data.validation=/data/held-out
torchrun --nproc-per-node 2 scripts/evaluate.py init_from=facebook/opt-1.3b parallel.tensor=2 data.validation=…
python scripts/evaluate.py init_from=… data.validation=labelled.jsonl           # a classifier

Task, precision and length are the checkpoint's unless they are given. The result is printed, and written to
`run.dir`/evaluation.json.
"""

from __future__ import annotations

import os
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from opt_parallel.compose import explain, judge_as_trained, register_schema, run_from, start_from_checkpoint
from opt_parallel.errors import reporting
from opt_parallel.log import quiet_libraries, say

said_in_one_line = partial(reporting, (HydraException, OmegaConfBaseException), explain)


@hydra.main(version_base="1.3", config_path="../configs", config_name="config")
def main(config: DictConfig) -> None:
    with said_in_one_line():
        judge_as_trained(config, HydraConfig.get().overrides.task)
        start_from_checkpoint(config, HydraConfig.get().overrides.task)
        run = run_from(config)
        from opt_parallel.judge import judge  # only now: torch takes seconds

        for name, value in judge(run).items():
            say(f"{name}: {value:,.6g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    quiet_libraries()
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the errors of composing, too
    with said_in_one_line():
        main()
