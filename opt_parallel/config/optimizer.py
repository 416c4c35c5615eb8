"""The optimizer's section of the configuration. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from opt_parallel.config.model import Section, require


class OptimizerName(Enum):
    """Names of the optimizers in `optim.OPTIMIZERS`."""

    adamw = "adamw"


class StateDtype(Enum):
    """Dtypes of the optimizer's moments and of the weights that it updates."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class OptimizerConfig(Section):
    """The optimizer and gradient clipping. `clip=0` disables clipping."""

    # name of the optimizer
    name: OptimizerName = OptimizerName.adamw
    # peak learning rate
    lr: float = 6e-4
    # decay rates of the two moments
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # number added to the square root of the second moment
    eps: float = 1e-8
    # weight decay of matrices; biases and LayerNorms have none
    weight_decay: float = 0.1
    # maximum gradient norm; 0: no clipping
    clip: float = 1.0
    # dtype of the moments and of the weights that the optimizer updates; bf16: there is no fp32 copy of the weights,
    # and each update is rounded stochastically; needs precision=bf16
    state_dtype: StateDtype = StateDtype.fp32

    def check(self) -> None:
        require(self.lr > 0, f"optimizer.lr={self.lr} must be positive")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas={list(self.betas)} must be two numbers, 0 ≤ beta < 1",
        )
        require(self.eps > 0, f"optimizer.eps={self.eps} must be positive")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must not be negative")
        require(self.clip >= 0, f"optimizer.clip={self.clip} must not be negative (0: no clipping)")
