"""OPT's classes with Hugging Face's documented interface, on the parallel model: the same arguments, outputs and losses
at any tensor degree.

    with Topology.open(tensor=2) as topology:
        model = OPTForCausalLM.from_pretrained("facebook/opt-125m", tensor=topology.tensor)
        loss = model(input_ids, labels=input_ids).loss

Every rank of the tensor group calls the same methods with the same arguments and gets the same, full results.
Shapes: B sequences of S tokens, K = S + tokens in the cache, L layers, A heads, H hidden size, E embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opt_parallel.checkpoint.sources import Opened
from opt_parallel.config.model import IGNORED, ModelConfig, ProblemType
from opt_parallel.huggingface.folder import GENERATION_CONFIG
from opt_parallel.huggingface.names import to_hf
from opt_parallel.model.cache import positions_held
from opt_parallel.model.heads import SCORE, classification_loss, last_tokens, problem_type_of
from opt_parallel.model.opt import Decoder, count_positions
from opt_parallel.model.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    SequenceClassifierOutputWithPast,
)
from opt_parallel.model.tracing import Trace, traced
from opt_parallel.parallel.linear import Linear
from opt_parallel.parallel.random import Draw
from opt_parallel.parallel.shard import Source, logical_shapes
from opt_parallel.parallel.vocab import VocabParallelHead
from opt_parallel.pretrained.base import PREFIX, PretrainedOPT
from opt_parallel.pretrained.cache import cache_of
from opt_parallel.pretrained.generation import GenerationConfig, continued
from opt_parallel.pretrained.inputs import (
    check_head_mask,
    check_inputs,
    check_labels,
    check_mask,
    check_positions,
    check_token_labels,
    mask_of,
)
from opt_parallel.runtime.errors import WrongArgument, refusing

Output = TypeVar("Output", bound=ModelOutput)


class OPTModel(PretrainedOPT):
    """The decoder alone: hidden states."""

    def _build(self, network: ModelConfig) -> None:
        self.decoder = Decoder(network, self.group)
        self.samples, self.forwards = 0, 0  # number of samples and forwards in training mode

    def _source(self, opened: Opened, new_head: bool) -> Source:
        opened.check_classifier()
        return opened.weights

    def _to_theirs(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return {theirs.removeprefix(PREFIX): part for theirs, part in to_hf(name, values).items()}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states (B, S, E), after the last LayerNorm and projection: BaseModelOutputWithPast, or a tuple.

        Args:
            input_ids: (B, S), or inputs_embeds (B, S, E).
            attention_mask: (B, K), 1 for tokens and 0 for padding; None: no padding.
            head_mask: (A,) or (L, A), factors of the heads' outputs.
            past_key_values: from an earlier output, a tuple of L pairs, or transformers' cache. A cache of this
                package is extended in place. A rank's cache holds its share of the heads.
            use_cache: whether to return past_key_values. None, here and below: as in `config`.
            output_attentions: whether to return attention weights; disables the fused attention.
            output_hidden_states: whether to return the hidden states before each layer and after the last.
            return_dict: False: a tuple of what the output holds.
            position_ids: (B, S) from 0, −1 for padding; None: the mask's cumulative sum.

        Raises: ValueError."""
        config = self.config
        network = self.decoder.config
        input_ids = check_inputs(network, input_ids, inputs_embeds)
        embeddings = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = embeddings.shape
        cache = None if past_key_values is None else cache_of(past_key_values, network, batch, self.group)
        past = positions_held(cache)
        if past + length > network.max_position_embeddings:
            raise ValueError(
                f"{past + length} tokens are more than max_position_embeddings={network.max_position_embeddings}"
            )
        positions, mask = self._positions(position_ids, attention_mask, batch, length, past)
        keeps = self._keeps_cache(use_cache)
        if keeps and cache is None:
            cache = self.decoder.new_cache(batch, length)
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = config.output_attentions if output_attentions is None else output_attentions
        trace = Trace([] if states else None, [] if attentions else None, mask)
        factors = None if head_mask is None else check_head_mask(head_mask, network)
        draw = self._draw(batch, embeddings.device) if self.training else None
        with traced(self.decoder, trace, factors):
            hidden = self.decoder.decode(embeddings, positions, None, draw, cache)
        output = BaseModelOutputWithPast(
            hidden,
            cache if keeps else None,
            None if trace.hidden_states is None else (*trace.hidden_states, hidden),
            None if trace.attentions is None else tuple(trace.attentions),
        )
        return _returned(output, return_dict, config.return_dict)

    def _positions(
        self, position_ids: Tensor | None, attention_mask: Tensor | None, batch: int, length: int, past: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positions (B, S) and the layers' mask; None: the decoder's own."""
        positions, mask = None, None
        if attention_mask is not None:
            check_mask(attention_mask, batch, past + length)
            mask = mask_of(attention_mask, length)
            if mask is not None:
                positions = count_positions(attention_mask.long(), past, batch, length, attention_mask.device)
        if position_ids is not None:
            positions = check_positions(position_ids, self.decoder.config, batch, length)
        return positions, mask

    def _keeps_cache(self, use_cache: bool | None) -> bool:
        """Whether a forward returns its cache: a layer that is recomputed, or dropped, cannot fill it."""
        if not self.training:
            return self.config.use_cache if use_cache is None else use_cache
        unable = self.is_gradient_checkpointing or self.decoder.config.layerdrop > 0
        if use_cache and unable:
            why = "gradient checkpointing" if self.is_gradient_checkpointing else "layerdrop"
            raise ValueError(f"use_cache=True does not work with {why} in training: set use_cache=False")
        return not unable and (self.config.use_cache if use_cache is None else use_cache)

    def _draw(self, batch: int, device: torch.device) -> Draw:
        samples = torch.arange(self.samples, self.samples + batch, device=device)
        draw = Draw(self.seed, self.forwards, 0, 0, samples)
        self.samples, self.forwards = self.samples + batch, self.forwards + 1
        return draw


class OPTForCausalLM(PretrainedOPT):
    """The language model."""

    def _build(self, network: ModelConfig) -> None:
        self.model = OPTModel(self.config, tensor=self.group, seed=self.seed, device="meta")
        self.lm_head = VocabParallelHead(self.model.decoder.embed_tokens)
        self.generation_config = GenerationConfig()

    @property
    def decoder(self) -> Decoder:
        """The decoder, which generation asks for."""
        return self.model.decoder

    def _source(self, opened: Opened, new_head: bool) -> Source:
        opened.check_language_model()
        return opened.weights

    def _read_files(self, folder: Path) -> None:
        self.generation_config = GenerationConfig.read(folder)

    def _files(self) -> dict[str, bytes]:
        return {GENERATION_CONFIG: self.generation_config.content(self.config)}

    def get_output_embeddings(self) -> nn.Module:
        """The output projection, tied to the embedding."""
        return self.lm_head

    def tie_weights(self) -> None:
        """Give the output projection the embedding's parameter."""
        self.lm_head = VocabParallelHead(self.model.decoder.embed_tokens)

    def state_dict(self, *args: Any, **arguments: Any) -> Any:
        """torch's `state_dict` with transformers' keys. `lm_head.weight` is a copy, because transformers' Trainer
        writes safetensors, which refuse tied tensors."""
        state = super().state_dict(*args, **arguments)
        if not arguments.get("keep_vars", False):
            name = f"{arguments.get('prefix', '')}lm_head.weight"
            state[name] = state[name].clone()
        return state

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, S, V) and, with `labels` (B, S), the mean next-token cross entropy: CausalLMOutputWithPast, or a
        tuple.

        Args:
            labels: token ids, shifted here; −100 is ignored.
            logits_to_keep: the number of last positions to compute logits for, or their indices; 0: all.

        The other arguments are OPTModel's. Raises: ValueError."""
        decoded = self.model(
            input_ids, attention_mask, head_mask, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, True, position_ids=position_ids,
        )  # fmt: skip
        hidden = decoded.last_hidden_state
        if labels is not None:
            check_token_labels(labels, hidden.shape[:2], self.model.decoder.config.vocab_size)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            predicted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(predicted.float(), targets.long(), ignore_index=IGNORED)
        output = CausalLMOutputWithPast(loss, logits, **_besides(decoded))
        return _returned(output, return_dict, self.config.return_dict)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue prompts (B, P), padded on the left; returns prompts with n new tokens (B · texts, P + n).

        Args:
            inputs: the prompts, also by the name `input_ids`; None: the
                beginning-of-text token alone.
            generation_config: ours, transformers', or a dictionary; settings that it leaves open are those of
                `self.generation_config`, which `from_pretrained` reads from generation_config.json.
            attention_mask: (B, P), 0 for padding; None: padding tokens are masked.
            streamer: an object with `put(tokens)` and `end()`, such as transformers' TextStreamer.
            seed: the seed of random sampling. A token depends on the seed, its row and its position only. None:
                from torch's generator, which `torch.manual_seed` sets; a tensor group takes its first rank's.
            settings: the fields of `GenerationConfig`.

        Raises: WrongArgument."""
        if inputs is not None and input_ids is not None:
            raise WrongArgument("generate: inputs and input_ids are both prompts: give one of them")
        prompts, given = input_ids if inputs is None else inputs, generation_config
        with refusing("generate"):
            chosen = [self.generation_config, *([] if given is None else [GenerationConfig.of(given)])]
            number = int(torch.randint(2**31, ())) if seed is None else seed
            return continued(self, self.config, prompts, attention_mask, chosen, settings, streamer, number)


class OPTForSequenceClassification(PretrainedOPT):
    """Scores of sequences, read at the last token that is not padding."""

    def _build(self, network: ModelConfig) -> None:
        self.num_labels = self.config.num_labels
        self.model = OPTModel(self.config, tensor=self.group, seed=self.seed, device="meta")
        self.score = Linear(network.embedding_size, self.num_labels, network.std)

    def _source(self, opened: Opened, new_head: bool) -> Source:
        wanted = {name.removeprefix(PREFIX): shape for name, shape in logical_shapes(self).items()}
        assert SCORE in wanted
        return opened.with_head(wanted, self.seed, replaced=new_head)

    def _content(self) -> dict[str, Any]:
        labels = self.config.labels()
        if len(labels.names) != self.num_labels:
            raise ValueError(
                f"config.id2label names {len(labels.names)} labels, and the head has {self.num_labels} scores: name as "
                "many"
            )
        return super()._content()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Scores (B, N) of N labels and, with `labels`, their loss by `config.problem_type`, see `classification_loss`:
        SequenceClassifierOutputWithPast, or a tuple.

        Without a problem type the first labels decide, and set it: regression if N = 1, single label for integers, else
        multi label (B, N). With `inputs_embeds`, or without a padding token, the last position is read. The other
        arguments are OPTModel's.

        Raises: ValueError."""
        decoded = self.model(
            input_ids, attention_mask, head_mask, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, True, position_ids=position_ids,
        )  # fmt: skip
        hidden = decoded.last_hidden_state
        ids, pad = None if input_ids is None else input_ids.view(hidden.shape[:2]), self.config.pad_token_id
        scores = self.score(last_tokens(hidden, None if pad is None else ids, pad or 0))
        loss = None
        if labels is not None:
            problem_type = self.config.labels().problem_type or problem_type_of(self.num_labels, labels)
            check_labels(labels, scores.size(0), self.num_labels, problem_type)
            self.config.problem_type = problem_type.value
            targets = labels.long() if problem_type is ProblemType.single_label_classification else labels
            loss = classification_loss(scores, targets, problem_type)
        output = SequenceClassifierOutputWithPast(loss, scores, **_besides(decoded))
        return _returned(output, return_dict, self.config.return_dict)


def _besides(decoded: BaseModelOutputWithPast) -> dict[str, Any]:
    """The fields that every output has besides its own result."""
    return {name: getattr(decoded, name) for name in ("past_key_values", "hidden_states", "attentions")}


def _returned(output: Output, return_dict: bool | None, configured: bool) -> Output | tuple[Any, ...]:
    return output if (configured if return_dict is None else return_dict) else output.to_tuple()
