"""Linear layers split over a tensor group (Shoeybi et al. 2019, Megatron-LM, section 3).

    Y = X A:   A = [A_1 … A_t]  by columns   Y_i = X A_i           the outputs are concatenated
    Z = Y B:   B = [B_1; … B_t] by rows      Z   = Σ_i Y_i B_i     one all-reduce

A column-parallel layer followed by a row-parallel layer therefore needs one all-reduce in the forward pass (of Z) and
one in the backward pass (of the gradient of X). With sequence parallelism (`parallel/sequence.py`), X and Z are this
rank's part of the positions: an all-gather of X and a reduce-scatter of Z replace the all-reduce. PyTorch stores a
weight as (out, in). So the paper's columns are dim 0 of a weight in this module, and the paper's rows are dim 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.parallel.lora import column_term, initial_a, row_term
from opt_parallel.parallel.products import column_product, part_product, row_product
from opt_parallel.parallel.sequence import Split, layer_norm_of_part
from opt_parallel.parallel.shard import Constant, Normal, parameter, replicated, shard_of
from opt_parallel.parallel.topology import Group

EPS = 1e-5  # of LayerNorm


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are split over `group`: (…, in) → (…, blocks · out/t).

    The layer computes `blocks` matrix products with the same input as one product. With 3 blocks, the full (unsplit)
    weight is (3, out, in). This weight is split along dim 1, so each rank has query, key and value of the same heads.
    """

    def __init__(
        self, in_features: int, out_features: int, group: Group, std: float, bias: bool = True, blocks: int = 1
    ) -> None:
        super().__init__()
        self.group, self.blocks = group, blocks
        outputs = (out_features,) if blocks == 1 else (blocks, out_features)
        split = len(outputs) - 1
        self.weight = parameter((*outputs, in_features), Normal(std), decay=True, group=group, dim=split)
        self.bias = parameter(outputs, Constant(0.0), decay=False, group=group, dim=split) if bias else None
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None

    def adapt(self, rank: int, alpha: float, blocks: tuple[int, ...] = (0,)) -> None:
        """Add a LoRA term to each of the `blocks` (in ascending order). Each block has its own matrices A and B."""
        *outer, out_features, in_features = shard_of(self.weight).shape
        self.adapted, self.scale = blocks, alpha / rank
        several = (len(blocks),) if outer else ()
        self.lora_a = replicated((*several, rank, in_features), initial_a(in_features), decay=True)
        self.lora_b = parameter(
            (*several, out_features, rank), Constant(0.0), decay=True, group=self.group, dim=len(several)
        )

    def forward(self, hidden: Tensor, split: Split | None = None) -> Tensor:
        product = column_product(hidden, self.weight, self.bias, self.group, split)
        if self.lora_a is None or self.lora_b is None:
            return product
        return product + column_term(
            hidden, self.lora_a, self.lora_b, self.scale, self.adapted, self.blocks, self.group, split
        )


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are split over `group`: (…, in/t) → (…, out).

    The ranks' partial products are summed before the bias is added."""

    def __init__(self, in_features: int, out_features: int, group: Group, std: float, bias: bool = True) -> None:
        super().__init__()
        self.group = group
        self.weight = parameter((out_features, in_features), Normal(std), decay=True, group=group, dim=1)
        self.bias = replicated((out_features,), Constant(0.0), decay=False) if bias else None
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None

    def adapt(self, rank: int, alpha: float) -> None:
        """Add a LoRA term to the layer."""
        out_features, in_features = shard_of(self.weight).shape
        self.scale = alpha / rank
        self.lora_a = parameter((rank, in_features), initial_a(in_features), decay=True, group=self.group, dim=1)
        self.lora_b = replicated((out_features, rank), Constant(0.0), decay=True)

    def forward(self, hidden: Tensor, split: Split | None = None) -> Tensor:
        product = row_product(hidden, self.weight, self.bias, self.group, split)
        if self.lora_a is None or self.lora_b is None:
            return product
        return product + row_term(hidden, self.lora_a, self.lora_b, self.scale, self.group, split)


class Linear(nn.Module):
    """A linear layer (…, in) → (…, out) without bias, of which every rank holds a full copy.

    The projections of OPT-350m and the output layer of a classifier are such layers."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        super().__init__()
        self.weight = replicated((out_features, in_features), Normal(std), decay=True)

    def forward(self, hidden: Tensor, split: Split | None = None) -> Tensor:
        return F.linear(hidden, self.weight) if split is None else part_product(hidden, self.weight, split.group)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dim (Ba et al. 2016) with eps 1e-5, as in OPT.

    Every rank holds a full copy. Without `affine`, the layer has neither weight nor bias.
    """

    def __init__(self, size: int, affine: bool = True) -> None:
        super().__init__()
        self.shape = (size,)
        self.weight = replicated(self.shape, Constant(1.0), decay=False) if affine else None
        self.bias = replicated(self.shape, Constant(0.0), decay=False) if affine else None

    def forward(self, hidden: Tensor, split: Split | None = None) -> Tensor:
        if split is None or self.weight is None or self.bias is None:
            return F.layer_norm(hidden, self.shape, self.weight, self.bias, EPS)
        return layer_norm_of_part(hidden, self.weight, self.bias, EPS, split.group)
