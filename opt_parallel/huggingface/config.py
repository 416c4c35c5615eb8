"""Reads and writes Hugging Face's config.json of an OPT model, without importing torch.

No other module reads or writes this file. `network_of` and `config_for_hf` convert between its keys and `ModelConfig`.
For training, a key is used, or must have its only supported value, or is known to be irrelevant. Any other key is an
error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from opt_parallel.config.model import Activation, Labels, ModelConfig, ProblemType
from opt_parallel.runtime.errors import UserError, one_line
from opt_parallel.runtime.log import say
from opt_parallel.storage.foreign import file_in, read_json

CONFIG = "config.json"
CLASSIFIER = "OPTForSequenceClassification"
ADAPTER_CONFIG = "adapter_config.json"  # the configuration file of a PEFT adapter

# Fields that OPTConfig and ModelConfig have under the same name.
INTEGERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings",
    "bos_token_id", "pad_token_id", "eos_token_id",
)  # fmt: skip
SWITCHES = ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine")
RATES = ("dropout", "attention_dropout", "layerdrop")
SHARED = (*INTEGERS, *SWITCHES, *RATES)
# Defaults of OPTConfig that differ from those of ModelConfig.
DEFAULTS: dict[str, Any] = {"attention_dropout": 0.0}
INIT_STD = 0.02
# Keys of features that are not implemented, and the value with which such a key has no effect. Some of the keys occur
# only in files of older releases or of Galactica.
FIXED: dict[str, Any] = {
    "tie_word_embeddings": True, "activation_dropout": 0.0, "add_bias_logits": False, "add_cross_attention": False,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "is_encoder_decoder": False,
    "learned_embeddings": True, "pruned_heads": {}, "quantization_config": None, "scale_embedding": False,
    "scale_embeddings": False, "tie_encoder_decoder": False,
}  # fmt: skip
# Keys that do not affect the network, such as names, dtypes, and defaults of generation and of libraries.
BOOKKEEPING = {
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "attn_implementation",
    "auto_map", "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "label2id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "model_type", "name_or_path",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip
# Keys that fine-tuning tools (DeepSpeed-Chat, Unsloth, scripts for other networks) add to the file, and OPT ignores.
LEFT_BEHIND = {
    "_flash_attn_2_enabled", "end_token_id", "gradient_checkpointing", "keys_to_ignore_at_inference", "loss_type",
    "max_seq_length", "max_sequence_length", "model_max_length", "neftune_noise_alpha", "pretraining_tp",
    "tokenizer_name", "tokenizer_name_or_path", "unsloth_fixed", "unsloth_version", "use_flash_attention",
    "use_flash_attention_2", "use_flash_attn",
}  # fmt: skip
MOST_LABELS = 1_000_000
OWN = {"_remove_final_layer_norm", "activation_function", "init_std", "word_embed_proj_dim"}


def read_config(folder: Path) -> ModelConfig:
    """The network that the config.json in a Hugging Face folder describes.

    Raises: UserError if the network is not an OPT model, or has an unknown key or a feature that is not implemented."""
    values, path = read_values(folder), folder / CONFIG
    unknown = sorted(values.keys() - {*SHARED, *FIXED, *OWN, *LEFT_BEHIND} - BOOKKEEPING)
    if unknown:
        raise UserError(
            f"{path}: {', '.join(map(_printed, unknown)):.500} may change the network, and OPT has no such key: "
            "remove the key from the file if it changes nothing"
        )
    network = network_of(values, f"{path}: ")
    _note_left_behind(path, tuple(sorted(values.keys() & LEFT_BEHIND)))
    return network


def network_of(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The network that the content of a config.json describes. Unknown keys are ignored.

    Raises: UserError, whose message starts with `where`."""
    for name, published in FIXED.items():
        if values.get(name, published) != published:
            raise UserError(f"{where}{name}={values[name]!r:.200} is not supported, only {published} is")
    activation = values.get("activation_function", "relu")
    if activation not in list(Activation.__members__):
        raise UserError(
            f"{where}activation_function={activation!r:.200} is not one of {', '.join(Activation.__members__)}"
        )
    _check_types(where, values)
    shared = DEFAULTS | {name: values[name] for name in SHARED if name in values}
    try:
        return ModelConfig(
            **shared,
            remove_final_layer_norm=values.get("_remove_final_layer_norm", False),
            word_embed_proj_dim=values.get("word_embed_proj_dim"),
            activation_function=Activation[activation],
            init_std=values.get("init_std", INIT_STD),
        )
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def config_for_hf(model: ModelConfig, dtype: object) -> dict[str, Any]:
    """The content of config.json for a language model. `dtype` is the dtype of the weights, or its name."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **{name: getattr(model, name) for name in SHARED},
        "_remove_final_layer_norm": model.remove_final_layer_norm,
        "activation_function": model.activation_function.value,
        "word_embed_proj_dim": model.embedding_size,
        "init_std": model.std,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def labels_for_hf(labels: Labels) -> dict[str, Any]:
    """The part of config.json that describes the labels of a classifier."""
    return {
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: number for number, name in enumerate(labels.names)},
        "problem_type": None if labels.problem_type is None else labels.problem_type.value,
    }


def as_json(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file in a Hugging Face folder."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def is_classifier(folder: Path) -> bool:
    """Whether config.json in `folder` names a classifier."""
    architectures = read_values(folder).get("architectures")
    return isinstance(architectures, list) and CLASSIFIER in architectures


def read_labels(folder: Path) -> Labels:
    """The labels that config.json in a Hugging Face folder names. Raises: UserError, see `labels_of`."""
    return labels_of(read_values(folder), f"{folder / CONFIG}: ")


def labels_of(values: Mapping[str, Any], where: str) -> Labels:
    """The labels that the content of a config.json names, or OPTConfig's default of two labels.

    Raises: UserError if the labels are not numbered from 0 without a gap, or if the problem type is unknown. The error
    message starts with `where`."""
    number = values.get("num_labels", 2)
    if type(number) is not int or not 1 <= number <= MOST_LABELS:
        raise UserError(f"{where}num_labels={json.dumps(number):.200} must be a whole number, 1 to {MOST_LABELS:,}")
    named = values.get("id2label") or dict(enumerate(Labels.numbered(number).names))
    problem = values.get("problem_type")
    if problem not in [None, *ProblemType.__members__]:
        raise UserError(f"{where}problem_type={problem!r:.200} is not one of {', '.join(ProblemType.__members__)}")
    if not isinstance(named, dict) or {str(label) for label in named} != {str(label) for label in range(len(named))}:
        raise UserError(f"{where}id2label={named!s:.200} must name the labels 0, 1, … without a gap")
    names = {str(label): str(name) for label, name in named.items()}
    in_order = tuple(names[str(label)] for label in range(len(names)))
    return Labels(in_order, None if problem is None else ProblemType[problem])


def _printed(name: str) -> str:
    return name if name.isprintable() else repr(name)


def read_values(folder: Path) -> dict[str, Any]:
    """The content of config.json in `folder`. Raises: UserError if the file is missing or describes no OPT model."""
    path = file_in(folder, CONFIG)
    if path is None:
        raise UserError(f"{folder} is not a checkpoint: it has no {CONFIG}")
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a checkpoint: {CONFIG} cannot be read ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{folder} is not a checkpoint: {CONFIG} is not a JSON object")
    if values.get("model_type") != "opt":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r:.200}, not 'opt'")
    return values


def _check_types(where: str, values: Mapping[str, Any]) -> None:
    """Raise UserError if a value has the wrong type, because Python would accept `true` as 1, and 64.0 as a size."""
    kinds = [
        ("a whole number", (int,), INTEGERS),
        ("true or false", (bool,), (*SWITCHES, "_remove_final_layer_norm")),
        ("a number", (int, float), RATES),
        ("a whole number or null", (int, type(None)), ("word_embed_proj_dim",)),
        ("a number or null", (int, float, type(None)), ("init_std",)),
    ]
    for kind, types, names in kinds:
        for name in names:
            if name not in values:
                continue
            value = values[name]
            if type(value) not in types or (type(value) is float and not math.isfinite(value)):
                raise UserError(f"{where}{name}={json.dumps(value, default=str):.200} must be {kind}")


@cache
def _note_left_behind(path: Path, names: tuple[str, ...]) -> None:
    """Print which keys of a file are ignored, once for each file."""
    if names:
        say(f"note: {path}: OPT does not use the keys {', '.join(names)}, so their values are ignored")
