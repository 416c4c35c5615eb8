"""OPT's classes with Hugging Face's documented interface, on the parallel model: the same arguments, outputs and losses
at any tensor degree.

    with Topology.open(tensor=2) as topology:
        model = OPTForCausalLM.from_pretrained("facebook/opt-125m", topology.tensor)
        loss = model(input_ids, labels=input_ids).loss

Every rank of the tensor group calls the same methods with the same arguments and gets the same, full results.
Shapes: B sequences of S tokens, K = S + tokens in the cache, L layers, A heads, H hidden size, E embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.model import IGNORED, Labels, ProblemType
from opt_parallel.config.units import bytes_of
from opt_parallel.huggingface.folder import write_folder
from opt_parallel.huggingface.names import config_for_hf, labels_for_hf, to_hf
from opt_parallel.model.cache import Cache, positions_held
from opt_parallel.model.decoding import Decoding
from opt_parallel.model.generation import generate
from opt_parallel.model.heads import CausalLM, SequenceClassifier, classification_loss, last_tokens, problem_type_of
from opt_parallel.model.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    SequenceClassifierOutputWithPast,
)
from opt_parallel.model.tracing import Trace, traced
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import gather_parameter, marked
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime.errors import UserError

Output = TypeVar("Output", bound=ModelOutput)


class Arguments(TypedDict, total=False):
    """Arguments of every forward besides `input_ids` (B, S) and `attention_mask` (B, K)."""

    inputs_embeds: Tensor | None  # (B, S, E), instead of input_ids
    position_ids: Tensor | None  # (B, S) from 0, −1 for padding; None: the mask's cumulative sum
    head_mask: Tensor | None  # (A,) or (L, A), factors of the heads' outputs
    past_key_values: Cache | None  # from an earlier output; extended in place
    use_cache: bool | None  # whether to return past_key_values; None: unless training
    output_attentions: bool | None  # return attention weights; disables the fused attention
    output_hidden_states: bool | None


class _Pretrained(nn.Module):
    """Base of the three classes: runs the decoder with the documented arguments.

    Dropout and LayerDrop act in training mode. They depend on `seed` and the number of samples and forwards so far, and
    are the same on all ranks.
    """

    def __init__(self, model: CausalLM | SequenceClassifier, group: Group = ALONE, seed: int = 0) -> None:
        super().__init__()
        self.model, self.group, self.config, self.seed = model, group, model.decoder.config, seed
        self.samples, self.forwards = 0, 0  # number of samples and forwards in training mode

    @classmethod
    def from_pretrained(
        cls, name: str | Path, group: Group = ALONE, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load the checkpoint `name`: a Hugging Face folder or hub id, or a training checkpoint.

        Raises: UserError if it cannot be read or is not an OPT."""
        return cls(open_checkpoint(name).model(group, torch.device(device), dtype), group).eval()

    def save_pretrained(self, folder: str | Path, max_shard_size: str | int = "5GB") -> None:
        """Write a folder for `from_pretrained`, here and in transformers, in the weights' dtype. Atomic.

        Every rank of the tensor group must call this; the first rank writes, one tensor at a time. If several tensor
        groups hold the same model, only one group may call it. Raises: UserError."""
        if Path(folder).exists():
            raise UserError(f"{folder} exists: remove it or choose another folder")
        tensors = {name: tensor for name, tensor, _ in marked(self.model)}
        write_folder(
            Path(folder),
            self._content(self.model.decoder.embed_tokens.weight.dtype),
            [(name, shard) for name, _, shard in marked(self.model)],
            lambda name, shard: gather_parameter(tensors[name], shard, self.group),
            self.model.decoder.embed_tokens.weight.dtype,
            bytes_of(max_shard_size, "max_shard_size="),
            to_theirs=self._to_theirs,
            group=self.group,
        )

    def _content(self, dtype: torch.dtype) -> dict[str, Any]:
        """The content of config.json."""
        return {**config_for_hf(self.config, dtype), "architectures": [type(self).__name__]}

    def _to_theirs(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return to_hf(name, values)

    def _decode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = False,
        output_hidden_states: bool | None = False,
    ) -> BaseModelOutputWithPast:
        batch, length, device = _extent(input_ids, inputs_embeds)
        keys = positions_held(past_key_values) + length
        self._check_inputs(input_ids, attention_mask, batch, keys)
        if keys > self.config.max_position_embeddings:
            raise ValueError(
                f"{keys} tokens are more than max_position_embeddings={self.config.max_position_embeddings}"
            )
        if head_mask is not None:
            head_mask = head_mask.expand(self.config.num_hidden_layers, self.config.num_attention_heads)
        use_cache = not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = self.model.decoder.new_cache(batch, length)
        trace = Trace([] if output_hidden_states else None, [] if output_attentions else None)
        segments = None if attention_mask is None else attention_mask.long()
        draw = self._draw(batch, device) if self.training else None
        decoder = self.model.decoder
        embeddings = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        with traced(decoder, trace, head_mask):
            hidden = decoder.decode(embeddings, position_ids, segments, draw, past_key_values)
        return BaseModelOutputWithPast(
            hidden,
            past_key_values if use_cache else None,
            None if trace.hidden_states is None else (*trace.hidden_states, hidden),
            None if trace.attentions is None else tuple(trace.attentions),
        )

    def _check_inputs(self, input_ids: Tensor | None, attention_mask: Tensor | None, batch: int, keys: int) -> None:
        """Raise ValueError for ids and masks that some tensor degrees would silently compute wrongly with."""
        if input_ids is not None and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.config.vocab_size:
            raise ValueError(f"input_ids holds ids outside 0 to vocab_size − 1 = {self.config.vocab_size - 1}")
        if attention_mask is not None and attention_mask.shape != (batch, keys):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not (batch, keys) = {(batch, keys)}")

    def _draw(self, batch: int, device: torch.device) -> Draw:
        samples = torch.arange(self.samples, self.samples + batch, device=device)
        draw = Draw(self.seed, self.forwards, 0, 0, samples)
        self.samples, self.forwards = self.samples + batch, self.forwards + 1
        return draw


class OPTModel(_Pretrained):
    """The decoder alone: hidden states."""

    model: CausalLM

    def _to_theirs(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return {theirs.removeprefix("model."): part for theirs, part in to_hf(name, values).items()}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        return_dict: bool | None = True,
        **arguments: Unpack[Arguments],
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states (B, S, E), after the last LayerNorm and projection."""
        return _returned(self._decode(input_ids, attention_mask, **arguments), return_dict)


class OPTForCausalLM(_Pretrained):
    """The language model."""

    model: CausalLM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_dict: bool | None = True,
        **arguments: Unpack[Arguments],
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, S, V) and, with `labels` (B, S), the mean next-token cross entropy.

        `labels` are token ids, shifted here; −100 is ignored."""
        decoded = self._decode(input_ids, attention_mask, **arguments)
        logits = self.model.lm_head(decoded.last_hidden_state)
        loss = None
        if labels is not None:
            predicted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(predicted.float(), targets, ignore_index=IGNORED)
        return _returned(CausalLMOutputWithPast(loss, logits, **_besides(decoded)), return_dict)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        seed: int = 0,
    ) -> Tensor:
        """Continue prompts (B, S), padded on the left; returns prompts with n new tokens (B, S + n).

        Greedy, sampled (`do_sample`) or beam search (`num_beams`); see `model.decoding.Decoding`.
        Raises: UserError; ValueError for ids, masks or lengths that do not fit."""
        self._check_inputs(input_ids, attention_mask, *input_ids.shape)
        for name, given, neutral in (("temperature", temperature, 1.0), ("top_k", top_k, None), ("top_p", top_p, 1.0)):
            if not do_sample and given != neutral:
                raise UserError(f"{name}={given} affects sampling only: set do_sample=True, or leave {name} out")
        if do_sample and temperature == 0:
            raise UserError("do_sample=True with temperature=0 is greedy: leave both out")
        temperature = temperature if do_sample else 0.0
        decoding = Decoding(max_new_tokens, temperature, top_k, top_p, num_beams, length_penalty, seed)
        return generate(self.model, input_ids, attention_mask, decoding)


class OPTForSequenceClassification(_Pretrained):
    """Scores of sequences, read at the last token that is not padding."""

    model: SequenceClassifier

    def __init__(self, model: SequenceClassifier, labels: Labels, group: Group = ALONE, seed: int = 0) -> None:
        super().__init__(model, group, seed)
        self.labels, self.num_labels = labels, len(labels.names)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        group: Group = ALONE,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_labels: int | None = None,
        problem_type: str | None = None,
        seed: int = 0,
    ) -> Self:
        """Load the checkpoint `name` of a classifier or a language model. A language model gets a new head, initialised
        from `seed`, with a warning. `num_labels`, `problem_type`: None: the checkpoint's own.

        Raises: UserError if it cannot be read, is not an OPT, or has a head for another number of labels."""
        opened = open_checkpoint(name)
        labels = opened.labels
        if num_labels is not None and num_labels != len(labels.names):
            labels = Labels.numbered(num_labels, labels.problem_type)
        if problem_type is not None:
            labels = Labels(labels.names, ProblemType(problem_type))
        model = opened.classifier(len(labels.names), group, torch.device(device), dtype, new_head=True, seed=seed)
        return cls(model, labels, group, seed).eval()

    def _content(self, dtype: torch.dtype) -> dict[str, Any]:
        return {**super()._content(dtype), **labels_for_hf(self.labels)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_dict: bool | None = True,
        **arguments: Unpack[Arguments],
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Scores (B, N) of N labels and, with `labels`, their loss by `problem_type`, see `classification_loss`.

        Without a `problem_type` the first labels decide: regression if N = 1, single label for integers, else multi
        label (B, N). With `inputs_embeds` the last position is read.
        """
        decoded = self._decode(input_ids, attention_mask, **arguments)
        scores = self.model.score(last_tokens(decoded.last_hidden_state, input_ids, self.config.pad_token_id))
        loss = None
        if labels is not None:
            problem_type = self.labels.problem_type or problem_type_of(self.num_labels, labels)
            self.labels = Labels(self.labels.names, problem_type)
            loss = classification_loss(scores, labels, problem_type)
        return _returned(SequenceClassifierOutputWithPast(loss, scores, **_besides(decoded)), return_dict)


def _extent(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int, torch.device]:
    """Batch size, length and device. Raises: ValueError."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    return given.size(0), given.size(1), given.device


def _besides(decoded: BaseModelOutputWithPast) -> dict[str, Any]:
    """The fields that every output has besides its own result."""
    return {name: getattr(decoded, name) for name in ("past_key_values", "hidden_states", "attentions")}


def _returned(output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
    return output.to_tuple() if return_dict is False else output
