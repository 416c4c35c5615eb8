"""The names that people type for `generate`, turned into `model.decoding.Decoding`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from opt_parallel.config.model import ModelConfig
from opt_parallel.huggingface.config import as_json
from opt_parallel.huggingface.folder import GENERATION_CONFIG
from opt_parallel.model.decoding import Decoding, LanguageModel
from opt_parallel.model.generation import generate
from opt_parallel.pretrained.config import OPTConfig
from opt_parallel.pretrained.inputs import check_ids, check_mask
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.storage.foreign import file_in, read_json

NEW_TOKENS, TOP_K = 20, 50  # transformers' defaults
SAMPLING = {"temperature": 1.0, "top_k": TOP_K, "top_p": 1.0}  # settings of sampling only
# settings of transformers that change nothing at these values, or without another model that helps
NEUTRAL = {"typical_p": 1.0, "encoder_repetition_penalty": 1.0, "num_beam_groups": 1, "transformers_version": ...}
OF_ASSISTANTS = ("assistant_", "num_assistant_", "is_assistant", "target_lookbehind", "max_matching_ngram_size", "_")
KINDS: dict[str, tuple[str, ...]] = {
    "a whole number": (
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k",
        "no_repeat_ngram_size", "pad_token_id", "bos_token_id",
    ),
    "a number": ("temperature", "top_p", "repetition_penalty", "length_penalty"),
    "True or False": ("do_sample", "use_cache"),
}  # fmt: skip
TYPES = {"a whole number": (int,), "a number": (int, float), "True or False": (bool,)}
OURS = {"beams": "num_beams", "texts": "num_return_sequences", "no_repeat_ngram": "no_repeat_ngram_size"}


@dataclass
class GenerationConfig:
    """Settings of `generate`; None: the default. Names and meaning are transformers'.

    Length: `max_new_tokens`, or `max_length` with the prompt (20 new tokens); `min_new_tokens`, or `min_length` with
    the prompt. Sampling: `do_sample`, `temperature`, `top_k` (50; 0: all), `top_p`. Search: `num_beams`,
    `length_penalty`, `early_stopping` (False, True or "never"). `num_return_sequences`: texts per prompt, sampled or of
    a search. `repetition_penalty`, `no_repeat_ngram_size`. `eos_token_id`: one token that ends a text, or several.
    `others`: settings of a generation_config.json that are not supported. They are kept, and `generate` refuses them.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    use_cache: bool | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def update(self, **settings: Any) -> dict[str, Any]:
        """Set settings; returns those that it does not know."""
        unknown = {name: value for name, value in settings.items() if name not in vars(self)}
        for name in settings.keys() - unknown.keys():
            setattr(self, name, settings[name])
        return unknown

    @classmethod
    def of(cls, values: Any) -> Self:
        """Settings from a dictionary, or from an object with `to_dict`, such as transformers' GenerationConfig."""
        found = values if isinstance(values, Mapping) else values.to_dict()
        known = {each.name for each in fields(cls)} - {"others"}
        settings = {name: value for name, value in found.items() if name in known}
        others = {name: value for name, value in found.items() if name not in known and _matters(name, value)}
        return cls(**settings, others={**found.get("others", {}), **others})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The settings of a folder's generation_config.json; empty without one. Raises: UserError."""
        path = file_in(folder, GENERATION_CONFIG)
        try:
            values = {} if path is None else read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): remove it, or use a complete copy") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} is not a JSON object: remove it, or use a complete copy")
        return cls.of(values)

    def to_dict(self) -> dict[str, Any]:
        """The settings that are given."""
        own = {name: value for name, value in asdict(self).items() if value is not None and name != "others"}
        return {**self.others, **own}

    def content(self, config: OPTConfig) -> bytes:
        """The content of generation_config.json for a model of this configuration."""
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return as_json({**tokens, **self.to_dict()})


def continued(
    model: LanguageModel,
    config: OPTConfig,
    inputs: Tensor | None,
    mask: Tensor | None,
    settings: Sequence[GenerationConfig],
    typed: Mapping[str, Any],
    streamer: Any,
    seed: int,
) -> Tensor:
    """`OPTForCausalLM.generate`. Of the `settings` later ones count, and `typed` count most. Raises: UserError;
    ValueError."""
    known = {each.name for each in fields(GenerationConfig)} - {"others"}
    for name in typed:
        if name not in known and _matters(name, typed[name]):
            raise UserError(f"{name} is not an argument: check its spelling; supported are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for each in settings:
        values |= each.to_dict()
    values |= {name: value for name, value in typed.items() if value is not None and name in known}
    for name in values.keys() - known:
        raise UserError(f"{name}={values[name]!r:.200} of the generation config is not supported: set it to None")
    _check(values, typed)
    ids, mask, ends = _prompts(model, config, inputs, mask, values)
    values.setdefault("pad_token_id", ends[0] if config.pad_token_id is None else config.pad_token_id)
    decoding = _decoding(model.decoder.config, values, typed, ids.size(1), ends, seed)
    try:
        if streamer is None:
            return generate(model, ids, mask, decoding)
        if decoding.beams > 1:
            raise UserError(f"a streamer needs each token when it is chosen, and num_beams={decoding.beams} chooses at "
                            "the end: leave one of them out")  # fmt: skip
        streamer.put(ids.cpu())
        output = generate(model, ids, mask, decoding, on_tokens=lambda tokens: streamer.put(torch.tensor(tokens)))
        streamer.end()
        return output
    except UserError as error:
        raise UserError(_renamed(str(error))) from error


def _matters(name: str, value: Any) -> bool:
    """Whether a setting that we do not have would change something."""
    given = value is not None if isinstance(value, Tensor) else bool(value)
    return given and NEUTRAL.get(name) not in (value, ...) and not name.startswith(OF_ASSISTANTS)


def _check(values: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """Raise UserError for values of the wrong type, and for arguments that contradict each other."""
    for kind, names in KINDS.items():
        for name in names:
            if name in values and type(values[name]) not in TYPES[kind]:
                raise UserError(f"{name}={values[name]!r:.80} must be {kind}")
    if typed.get("use_cache") is False:
        raise UserError("use_cache=False is not supported: generation always uses its cache; leave it out")
    if typed.get("max_length") is not None and typed.get("max_new_tokens") is not None:
        raise UserError(
            f"max_length={typed['max_length']} counts the prompt, and max_new_tokens={typed['max_new_tokens']} does "
            "not: give one of them"
        )
    sampled = values.get("do_sample", False)
    for name, neutral in SAMPLING.items():
        if not sampled and typed.get(name) not in (None, neutral, 1.0 if name == "top_p" else 0):
            raise UserError(f"{name}={typed[name]} affects sampling only: set do_sample=True, or leave {name} out")
    if sampled and values.get("temperature") == 0:
        raise UserError("do_sample=True with temperature=0 is greedy: leave both out")
    if sampled and values.get("num_beams", 1) > 1:
        raise UserError(f"num_beams={values['num_beams']} searches and do_sample=True samples: choose one of them")
    texts = values.get("num_return_sequences", 1)
    if not sampled and texts > values.get("num_beams", 1):
        raise UserError(
            f"num_return_sequences={texts}: greedy decoding gives one text per prompt, and a search no more than "
            f"num_beams={values.get('num_beams', 1)}: set do_sample=True, or num_beams={texts}"
        )


def _prompts(
    model: LanguageModel, config: OPTConfig, ids: Tensor | None, mask: Tensor | None, values: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """The prompts (B, P) and their mask, on the model's device; the tokens that end a text."""
    device = model.lm_head.weight.device
    if ids is None:
        ids = torch.tensor([[values.get("bos_token_id", config.bos_token_id)]])
    check_ids("inputs", ids, model.decoder.config.vocab_size)
    if ids.dim() != 2 or 0 in ids.shape:
        raise UserError(f"inputs is {tuple(ids.shape)}, not (prompts, tokens)")
    given = values.get("eos_token_id", config.eos_token_id)
    ends = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not ends or not all(type(end) is int for end in ends):
        raise UserError(f"eos_token_id={given!r:.80} must be a token id, or several")
    pad = values.get("pad_token_id", ends[0] if config.pad_token_id is None else config.pad_token_id)
    if mask is not None:
        check_mask(mask, *ids.shape)
    elif pad not in ends and bool((ids == pad).any()):
        mask = (ids != pad).long()
    return ids.to(device).long(), None if mask is None else mask.to(device), ends


def _decoding(
    model: ModelConfig,
    values: Mapping[str, Any],
    typed: Mapping[str, Any],
    prompt: int,
    ends: tuple[int, ...],
    seed: int,
) -> Decoding:
    positions, vocabulary = model.max_position_embeddings, model.vocab_size
    by_length = typed.get("max_length") is not None or "max_new_tokens" not in values
    if by_length and "max_length" in values:
        new = values["max_length"] - prompt
        if new < 1:
            raise UserError(
                f"max_length={values['max_length']} is not more than the prompt's {prompt} tokens, which it counts: "
                "raise it, or set max_new_tokens"
            )
    else:
        new = values.get("max_new_tokens", min(NEW_TOKENS, positions - prompt) if prompt < positions else NEW_TOKENS)
    sampled = values.get("do_sample", False)
    top_k = values.get("top_k", min(TOP_K, vocabulary))
    try:
        return Decoding(
            max_new_tokens=new,
            temperature=values.get("temperature", 1.0) if sampled else 0.0,
            top_k=top_k if sampled and top_k else None,
            top_p=values.get("top_p", 1.0) if sampled else 1.0,
            beams=values.get("num_beams", 1),
            length_penalty=values.get("length_penalty", 1.0),
            seed=seed,
            texts=values.get("num_return_sequences", 1),
            min_new_tokens=values.get("min_new_tokens", max(0, values.get("min_length", 0) - prompt)),
            repetition_penalty=values.get("repetition_penalty", 1.0),
            no_repeat_ngram=values.get("no_repeat_ngram_size", 0),
            early_stopping=values.get("early_stopping", False),
            ends=ends,
            pad=values["pad_token_id"],
        )
    except UserError as error:
        raise UserError(_renamed(str(error))) from error


def _renamed(message: str) -> str:
    """A message of `Decoding`, in transformers' names."""
    return re.sub(rf"\b({'|'.join(OURS)})(?==|\b to \b)", lambda match: OURS[match[1]], message)
