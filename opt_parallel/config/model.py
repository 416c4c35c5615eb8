"""The architecture settings of an OPT network, its number of parameters and its FLOPs.

Field names are those of Hugging Face's `OPTConfig`. The files of `configs/model/` hold the nine published sizes of OPT.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from opt_parallel.runtime.errors import UserError

IGNORED = -100  # Label of a position that the loss ignores.
POSITION_OFFSET = 2  # Position 0 is row 2 of the position table, as in fairseq.
# OPT-175B has 96 layers and 1.75 · 10¹¹ parameters.
MOST_LAYERS, MOST_PARAMETERS = 10_000, 10**15
MAY_DIFFER = {"dropout", "attention_dropout", "layerdrop", "init", "init_std"}  # between networks with the same weights


class Activation(Enum):
    relu = "relu"
    gelu = "gelu"
    silu = "silu"
    gelu_new = "gelu_new"


class Init(Enum):
    """Distributions of the initial weights. With `paper`, weights are drawn from N(0, 0.006), and the two projections
    into the residual stream are divided by sqrt(2 · layers) (Zhang et al. 2022, section 2.2, and metaseq). With
    `huggingface`, all weights are drawn from N(0, 0.02)."""

    paper = "paper"
    huggingface = "huggingface"


class ProblemType(Enum):
    """The kind of a classifier's labels, with Hugging Face's names. An example has numbers, one of N labels, or any
    subset of N labels."""

    regression = "regression"
    single_label_classification = "single_label_classification"
    multi_label_classification = "multi_label_classification"


@dataclass(frozen=True)
class Labels:
    """A classifier's label names in the order of its scores, and the kind of the labels. If the kind is None, it is
    inferred from the first labels."""

    names: tuple[str, ...]
    problem_type: ProblemType | None = None

    @classmethod
    def numbered(cls, count: int, problem_type: ProblemType | None = None) -> Labels:
        """`count` labels with the default names of transformers."""
        return cls(tuple(f"LABEL_{number}" for number in range(count)), problem_type)


class Section:
    """A section of the configuration, which is checked when it is created and immutable afterwards."""

    def __post_init__(self) -> None:
        self.check()
        object.__setattr__(self, "_sealed", True)

    def check(self) -> None:
        """Raise `UserError` if the values contradict each other."""

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_sealed", False):
            raise AttributeError(f"{type(self).__name__} is immutable; {name} cannot be set")
        object.__setattr__(self, name, value)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass
class ModelConfig(Section):
    """The network's architecture and initialisation. The defaults are those of the paper's 125M model. The defaults of
    `OPTConfig` differ only in attention_dropout."""

    # size of the vocabulary; a tokenizer may have fewer tokens
    vocab_size: int = 50272
    # width of the hidden states
    hidden_size: int = 768
    # number of decoder layers
    num_hidden_layers: int = 12
    # number of attention heads; must divide hidden_size and be a multiple of parallel.tensor
    num_attention_heads: int = 12
    # width of the feed-forward layer; a multiple of parallel.tensor
    ffn_dim: int = 3072
    # number of learned positions, and maximum length of a sequence
    max_position_embeddings: int = 2048
    # width of the token embedding; null: hidden_size. OPT-350m has 512, projected to and from hidden_size
    word_embed_proj_dim: int | None = None
    # LayerNorm before attention and feed-forward; false: after the residual sum, as in OPT-350m
    do_layer_norm_before: bool = True
    # leave out the LayerNorm after the last layer, as some early conversions of OPT do
    remove_final_layer_norm: bool = False
    # biases in the linear layers
    enable_bias: bool = True
    # weights and biases in the LayerNorms
    layer_norm_elementwise_affine: bool = True
    # activation of the feed-forward layer
    activation_function: Activation = Activation.relu
    # probability of dropping an element after attention and after feed-forward
    dropout: float = 0.1
    # probability of dropping an attention weight
    attention_dropout: float = 0.1
    # LayerDrop: probability of skipping a layer in a training step (Fan et al. 2019)
    layerdrop: float = 0.0
    # paper: N(0, 0.006), output layers divided by √(2 · layers); huggingface: N(0, 0.02)
    init: Init = Init.paper
    # standard deviation of the initial weights; null: the value of init
    init_std: float | None = None
    # id of the token that begins a prompt
    bos_token_id: int = 2
    # id of the padding token
    pad_token_id: int = 1
    # id of the token that ends a document
    eos_token_id: int = 2

    def check(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "ffn_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value} must be at least 1")
        require(
            self.num_hidden_layers <= MOST_LAYERS,
            f"model.num_hidden_layers={self.num_hidden_layers} is above the maximum of {MOST_LAYERS}: set fewer",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size={self.hidden_size} is not divisible by "
            f"model.num_attention_heads={self.num_attention_heads} "
            f"({self.hidden_size} = {self.num_attention_heads} × {self.hidden_size // self.num_attention_heads} "
            f"+ {self.hidden_size % self.num_attention_heads}); choose a head count that divides it",
        )
        for name in ("dropout", "attention_dropout", "layerdrop"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"model.{name}={value} must be a probability, 0 ≤ p < 1")
        for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, name)
            require(
                0 <= value < self.vocab_size,
                f"model.{name}={value} is not in the vocabulary: choose 0 to model.vocab_size − 1 = "
                f"{self.vocab_size - 1}",
            )
        require(self.embedding_size >= 1, f"model.word_embed_proj_dim={self.word_embed_proj_dim} must be at least 1")
        require(self.std >= 0, f"model.init_std={self.init_std} must not be negative")
        require(
            self.parameters() <= MOST_PARAMETERS,
            f"the network has {self.parameters():,} parameters (model.vocab_size={self.vocab_size}, hidden_size="
            f"{self.hidden_size}, ffn_dim={self.ffn_dim}, max_position_embeddings={self.max_position_embeddings}, "
            f"word_embed_proj_dim={self.word_embed_proj_dim}), more than the maximum of {MOST_PARAMETERS:,}: choose a "
            "smaller network",
        )

    def check_splits(self, tensor: int, key: str) -> None:
        """Raise UserError unless `tensor` ranks can split the attention heads, the feed-forward layer and the
        vocabulary. `key` is the key that set `tensor`, for the message."""
        for what in ("num_attention_heads", "ffn_dim"):
            size = getattr(self, what)
            require(
                size % tensor == 0,
                f"model.{what}={size} is not divisible by {key}{tensor} "
                f"({size} = {tensor} × {size // tensor} + {size % tensor}); choose a tensor degree that divides it",
            )
        rows = -(-self.vocab_size // tensor)
        require(
            (tensor - 1) * rows < self.vocab_size,
            f"model.vocab_size={self.vocab_size} leaves a rank of {key}{tensor} without tokens: "
            f"each other rank has {rows}; choose a smaller tensor degree",
        )

    @property
    def embedding_size(self) -> int:
        """Width of the token embedding, which equals `hidden_size` unless the embedding is projected, as in
        OPT-350m."""
        return self.hidden_size if self.word_embed_proj_dim is None else self.word_embed_proj_dim

    @property
    def projected(self) -> bool:
        return self.embedding_size != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def std(self) -> float:
        """Standard deviation of the initial weights, from `init_std` or by default from `init`."""
        if self.init_std is not None:
            return self.init_std
        return 0.006 if self.init is Init.paper else 0.02

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one decoder layer."""
        hidden, ffn = self.hidden_size, self.ffn_dim
        biases = 4 * hidden + ffn + hidden if self.enable_bias else 0
        layer_norms = 4 * hidden if self.layer_norm_elementwise_affine else 0
        return 4 * hidden * hidden + 2 * hidden * ffn + biases + layer_norms

    def parameters(self) -> int:
        """Number of parameters. The LM head adds none, because it shares the token embedding's weights."""
        hidden, embedding = self.hidden_size, self.embedding_size
        layer_norm = 2 * hidden if self.layer_norm_elementwise_affine else 0
        embeddings = self.vocab_size * embedding + (self.max_position_embeddings + POSITION_OFFSET) * hidden
        projections = 2 * embedding * hidden if self.projected else 0
        final_layer_norm = layer_norm if self.has_final_layer_norm else 0
        return embeddings + projections + self.num_hidden_layers * self.layer_parameters + final_layer_norm

    def flops_per_token(self, sequence_length: int, frozen: bool = False) -> float:
        """Model FLOPs to train on one token, with forward and backward. Attention counts in full, although its mask is
        causal.

        The formula is that of Narayanan et al. 2021 (Megatron-LM), section 5.1, without recomputation, generalised to
        any feed-forward and embedding width. A backward counts as two forwards. With `frozen` weights their gradients
        are not computed, so a backward counts as one forward through the matrices. The matrices of LoRA are not
        counted.
        """
        projections = 4 * self.embedding_size * self.hidden_size if self.projected else 0
        head = 2 * self.vocab_size * self.embedding_size
        full = 3.0 * (self._layers_forward_flops(sequence_length) + projections + head)
        return full - (self._layers_forward_flops(0) + projections + head if frozen else 0)

    def recomputed_flops_per_token(self, sequence_length: int, whole: bool) -> float:
        """FLOPs that the backward repeats for one token: of the feed-forward's first product in every layer, or with
        `whole` of all of the layer. Its last product is repeated only if a LayerNorm follows it."""
        product = self.num_hidden_layers * 2 * self.hidden_size * self.ffn_dim
        if not whole:
            return product
        return self._layers_forward_flops(sequence_length) - (product if self.do_layer_norm_before else 0)

    def _layers_forward_flops(self, sequence_length: int) -> int:
        products = 2 * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_dim)
        attention = 4 * sequence_length * self.hidden_size
        return self.num_hidden_layers * (products + attention)
