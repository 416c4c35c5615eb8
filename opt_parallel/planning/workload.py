"""What a plan is computed for: a network, how it is trained, and how it is spread over the devices.

A `Workload` describes the runs of this trainer (`of_run`) and those of other trainers whose measurements are published
(`rows.py`), so the same formulas serve both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from opt_parallel.config.model import POSITION_OFFSET, Activation
from opt_parallel.config.optimizer import StateDtype
from opt_parallel.config.run import Offload, Precision, Run


class Trainer(Enum):
    """The programs whose memory and time the formulas describe. They hold states and activations in different ways."""

    ours = "opt-parallel"
    megatron = "Megatron-LM"
    fsdp = "FSDP"  # torchtitan, KempnerForge, fms-fsdp
    deepspeed = "DeepSpeed ZeRO-3"


class Recompute(Enum):
    """What the backward computes again.

    The first four are the values of the key `activation_checkpointing`. `attention` is Megatron's selective
    recomputation of scores, softmax and dropout (Korthikanti et al. 2022), `feed_forward` also of the feed-forward.
    `operators` is torchtitan's: the results of every second matrix product and of attention are kept."""

    none = "none"
    selective = "selective"
    full = "full"
    offload = "offload"
    attention = "attention"
    feed_forward = "feed_forward"
    operators = "operators"


@dataclass(frozen=True)
class Network:
    """The shape of a decoder. `positions` are learned ones, 0 for rotary embeddings. `norm` is the number of vectors of
    a normalisation: 2 (LayerNorm), 1 (RMSNorm) or 0. `gated`: the feed-forward has three matrices."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden / heads
    gated: bool = False
    tied: bool = True
    positions: int = 0
    embedding: int = 0  # width of the embedding, 0: hidden
    activation_saves_output: bool = True  # relu's backward needs its output only, which the next product keeps too
    biases: bool = True
    norm: int = 2
    norm_first: bool = True
    final_norm: bool = True
    dropout: bool = True
    attention_dropout: bool = True

    @property
    def width(self) -> int:
        """Width of the token embedding."""
        return self.embedding or self.hidden

    @property
    def projected(self) -> bool:
        return self.width != self.hidden

    @property
    def queries(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def keys(self) -> int:
        """Width of the keys of all key/value heads, which is also the width of the values."""
        return self.queries * (self.kv_heads or self.heads) // self.heads

    @property
    def rows(self) -> int:
        """Rows of the position table."""
        return self.positions + POSITION_OFFSET if self.positions else 0


@dataclass(frozen=True)
class States:
    """Bytes of a trained parameter's states: working weight, gradient as it is summed, fp32 master, both moments."""

    weight: int = 2
    gradient: int = 4
    master: int = 4
    moments: int = 8


@dataclass(frozen=True)
class Logits:
    """What other trainers keep of the logits at the peak of the loss: bytes of each logit, and whether the ranks of a
    tensor group split the vocabulary there. This trainer keeps a chunk (`activations.loss_bytes`)."""

    value: float = 6.0
    split: bool = True


@dataclass(frozen=True)
class Workload:
    """A network in training on `tensor` × `pipeline` × `context` × `data` devices.

    `stage` is that of ZeRO. `data` counts the ranks that split ZeRO's states. `virtual` is the number of pieces of
    each pipeline stage (interleaved schedule), 1 for none. `trained` is false for LoRA's frozen base."""

    network: Network
    trainer: Trainer = Trainer.ours
    length: int = 2048
    micro: int = 1
    accumulation: int = 1
    precision: str = "bf16"  # fp32, bf16, fp16, or fp8 for products of a bf16 network
    states: States = States()
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    stage: int = 1
    recompute: Recompute = Recompute.none
    flash: bool = True
    flash2: bool = False  # on Hopper the kernel is FlashAttention-2
    compiled: bool = True
    overlap: bool = False  # the tensor group's collectives run beside the products, in pieces
    offload: bool = False
    lora: int = 0  # rank of LoRA's matrices, 0: every parameter is trained
    cpu: bool = False  # on a CPU the loss has smaller chunks
    packed: bool = False  # attention needs a mask of (length, length)
    logits: Logits = Logits()
    embedding_split: bool = True  # over the tensor group
    head_split: bool = True  # the output projection, over the tensor group
    gradients_split: bool = True  # between micro-batches
    reduced: int = 4  # bytes of a gradient that is summed over the data ranks
    scattered: bool = True  # the ranks of a tensor group send parts to the next pipeline stage
    ends_gathered: bool = False  # FSDP's embedding and output projection between the forward and the backward
    stage_memory: str = "last"  # the pipeline stage whose memory is wanted: first or last
    workspace: int = 0  # bytes that libraries allocate as tensors
    reduce_bucket: int = 50_000_000
    prefetch_bucket: int = 50_000_000
    persistence: int = 100_000
    layerdrop: float = 0.0

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.micro * self.accumulation * self.data

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch * self.length

    @property
    def value(self) -> int:
        """Bytes of a value of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def splits(self) -> int:
        """The number of ranks that split the positions between the products: sequence parallelism's."""
        return self.tensor if self.sequence else 1


def network_of(run: Run) -> Network:
    model = run.model
    return Network(
        layers=model.num_hidden_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        ffn=model.ffn_dim,
        vocab=model.vocab_size,
        positions=model.max_position_embeddings,
        embedding=model.embedding_size,
        activation_saves_output=model.activation_function is Activation.relu,
        biases=model.enable_bias,
        norm=2 if model.layer_norm_elementwise_affine else 0,
        norm_first=model.do_layer_norm_before,
        final_norm=model.has_final_layer_norm,
        dropout=model.dropout > 0,
        attention_dropout=model.attention_dropout > 0,
    )


def of_run(run: Run, world: int) -> Workload:
    """The workload of a run on `world` devices. The precision `auto` is planned as bf16."""
    precision = run.precision.name
    fp32, bf16_state = precision is Precision.fp32, run.optimizer.state_dtype is StateDtype.bf16
    data = world // run.parallel.tensor
    return Workload(
        network=network_of(run),
        length=run.data.sequence_length,
        micro=run.micro_batch,
        accumulation=run.global_batch // (run.micro_batch * data),
        precision="bf16" if precision is Precision.auto else precision.value,
        states=States(4 if fp32 else 2, 4, 0 if run.zero.stage == 0 or bf16_state else 4, 4 if bf16_state else 8),
        tensor=run.parallel.tensor,
        sequence=run.parallel.sequence and run.parallel.tensor > 1,
        data=data,
        stage=run.zero.stage,
        recompute=Recompute(run.activation_checkpointing.value),
        offload=run.zero.offload is Offload.cpu,
        lora=run.task.lora.rank,
        packed=not run.task.name.plain_text,
        reduce_bucket=run.zero.reduce_bucket_size,
        prefetch_bucket=run.zero.prefetch_bucket_size,
        persistence=run.zero.persistence_threshold,
        layerdrop=run.model.layerdrop,
    )
