"""Hydra's and OmegaConf's side of the configuration: composed YAML in, `Run` out, and back."""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from omegaconf.resolvers import oc

from opt_parallel.config import Run
from opt_parallel.errors import UserError, one_line, reporting
from opt_parallel.hf_config import ADAPTER_CONFIG, CONFIG, is_classifier, read_config, read_labels
from opt_parallel.hf_tokenizer import check_size, read_tokenizer
from opt_parallel.hub import find_checkpoint
from opt_parallel.log import quiet_libraries, say
from opt_parallel.manifest import MANIFEST, Damaged, read_manifest
from opt_parallel.overrides import checked
from opt_parallel.paths import absolute, change_paths, local, reach, refuse_breaks, text_keys
from opt_parallel.place import take_place
from opt_parallel.secrets import looks_secret, masked, refuse_secret_value
from opt_parallel.shapes import MAY_DIFFER, Labels, ModelConfig, ProblemType
from opt_parallel.storage.foreign import file_in
from opt_parallel.task_config import Task, name_of
from opt_parallel.terminal import outlive
from opt_parallel.values import check_values

PATHS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TEXTS = {*text_keys(Run), *PATHS_OF_HYDRA}


def command(main: Callable[[], None]) -> None:
    """Run a Hydra command line, `main` decorated with `hydra.main`: its mistakes are one line and status 2, and it
    works on when nobody reads what it prints."""
    with said_in_one_line():
        outlive()
        take_place()
        quiet_libraries()
        register_schema()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the errors of composing, too
        sys.argv[1:] = checked(sys.argv[1:], TEXTS)  # Hydra itself writes down what a multirun was given
        main()


class CheckConfig(Callback):
    """Checks what Hydra composed before Hydra makes its folders and writes the configuration of a multirun."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with said_in_one_line():  # Hydra would turn an exception into a warning
            check_values(OmegaConf.to_container(config))
            HydraConfig.instance().set_config(copy.deepcopy(config))  # run.name asks it for the model's name
            for key in PATHS_OF_HYDRA:
                name = str(OmegaConf.select(config, key))
                if (whole := local(f"{key}=", name)) != name:
                    raise UserError(f"{key}={name}: Hydra knows no ~: write {key}={whole}")
                reach(f"{key}=", name)

    on_multirun_start = on_run_start


def _from_environment(name: str, *default: Any) -> Any:
    """`${oc.env:NAME}`, but of no secret: a configuration is written beside the run, and sent to trackers."""
    if looks_secret(name):
        raise UserError(
            f"${{oc.env:{name}}} looks like a secret, and a run's configuration is written to files: leave it out; "
            "what needs it reads the environment itself"
        )
    value = oc.env(name, *default)
    refuse_secret_value(f"${{oc.env:{name}}}", str(value))
    return value


OmegaConf.register_new_resolver("oc.env", _from_environment, replace=True)


def verbatim(value: Any) -> Any:
    """Plain values with all text escaped, so that OmegaConf gives it back as it stands and interpolates nothing."""
    if isinstance(value, dict):
        return {key: verbatim(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [verbatim(inner) for inner in value]
    return re.sub(r"(\\*)(\$\{)", r"\1\1\\\2", value) if isinstance(value, str) else value


def take(config: DictConfig, key: str, value: Any) -> None:
    """Set a key to what a file or a folder's name says. The only way for text into a configuration that the user did
    not type into it."""
    OmegaConf.update(config, key, verbatim(value))


def register_schema() -> None:
    """Make the types known to Hydra as `schema`, first in the defaults of `configs/config.yaml`."""
    ConfigStore.instance().store(name="schema", node=Run)


def run_from(config: DictConfig) -> Run:
    """The composed configuration as a checked, sealed `Run`.

    Raises: `UserError`, OmegaConf's errors."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    check_values(values)
    refuse_breaks("run.name=", str(values["run"]["name"]))
    change_paths(values, Run, local)
    plain = OmegaConf.create(verbatim(values))
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), plain))  # refuses what `+key=…` added
    assert isinstance(run, Run)
    return run


def model_at(folder: Path, key: str) -> ModelConfig:
    """The network of one of our `checkpoints/step-<N>` or of a Hugging Face folder.

    Raises: UserError, which begins with `key`, as `init_from=`, if `folder` is neither."""
    if (folder / MANIFEST).is_file():
        return _model_of(folder, read_manifest(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{key}{folder} is a PEFT adapter, which is no network: name the LoRA run's own checkpoint, or merge the "
            "adapter into its base first (peft's merge_and_unload)"
        )
    if file_in(folder, CONFIG):
        return read_config(folder)
    raise UserError(
        f"{key}{folder} is neither a training checkpoint (…/checkpoints/step-<N>, with {MANIFEST}) nor a Hugging Face "
        f"folder (with {CONFIG})"
    )


def _model_of(folder: Path, manifest: dict[str, Any]) -> ModelConfig:
    try:
        saved = verbatim(manifest["config"]["model"])
        model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), saved))
    except (OmegaConfBaseException, UserError) as error:
        raise Damaged(folder, f"{MANIFEST} describes no network ({one_line(error)})") from error
    assert isinstance(model, ModelConfig)
    tensors = manifest["tensors"].values()  # of each layer at least one, also where LoRA trains
    held = sum(math.prod(tensor["shape"]) for tensor in tensors)
    if model.num_hidden_layers > len(tensors) or (not manifest.get("base") and model.parameters() > held):
        raise Damaged(folder, f"{MANIFEST} describes a larger network than its tensors are of")
    return model


def labels_at(folder: Path) -> Labels | None:
    """What the classifier of such a folder tells apart; None of a language model. Raises: `UserError`."""
    if (folder / MANIFEST).is_file():
        saved = read_manifest(folder).get("labels")
        problem = saved and saved["problem_type"]
        return saved and Labels(tuple(saved["names"]), problem and ProblemType(problem))
    return read_labels(folder) if is_classifier(folder) else None


def _take_labels(config: DictConfig, labels: Labels) -> None:
    """The classifier's labels, where the run leaves them open; those that it names must be the classifier's."""
    task = config.task
    if task.problem_type is None and labels.problem_type is not None:
        take(config, "task.problem_type", labels.problem_type)
    if labels == Labels.numbered(len(labels.names), labels.problem_type):
        return  # no names: whatever the data calls them
    if task.labels is None:
        take(config, "task.labels", labels.names)
    elif tuple(map(name_of, task.labels)) != labels.names:
        raise UserError(
            f"task.labels={list(task.labels)}, but the classifier of init_from={config.init_from} has "
            f"{list(labels.names)}: leave task.labels to it, or start from a language model"
        )


def start_from_checkpoint(config: DictConfig, overrides: Sequence[str]) -> None:
    """Where `init_from` names a checkpoint, take from it what `overrides`, the command line, left open: the network,
    the tokenizer, the run's name.

    Shapes that the command line does give must be the checkpoint's; a larger `model.vocab_size` lets its embedding
    grow, and ids of special tokens are the run's own. Raises: `UserError`."""
    if config.init_from is None:
        return
    folder = find_checkpoint(config.init_from, "init_from=")
    model = OmegaConf.structured(model_at(folder, "init_from="))
    given = {each.lstrip("+").partition("=")[0] for each in overrides}
    whole = bool({"model", "experiment"} & given)
    for name in model:
        if name in MAY_DIFFER:
            if not whole and f"model.{name}" not in given:
                take(config, f"model.{name}", model[name])
        elif name in SPECIAL_IDS and f"model.{name}" in given:
            continue
        elif name == "vocab_size" and f"model.{name}" in given:
            _require_may_grow(config, model[name])
        elif whole or f"model.{name}" in given:
            _require_same(config, str(name), model[name])
        else:
            take(config, f"model.{name}", model[name])
    labels = labels_at(folder)
    if config.task.name is Task.classify and labels is not None:
        _take_labels(config, labels)
    if config.data.tokenizer is None:
        take(config, "data.tokenizer", str(_tokenizer_of(folder, config.init_from)))
    if not {"run.name", "experiment"} & given:
        ours = folder.parent.name == "checkpoints"  # runs/<name>/checkpoints/step-<N>
        base = (
            f"{folder.parent.parent.name}-{folder.name}"
            if ours
            else Path(config.init_from).name.strip(".") or folder.resolve().name
        )
        # not the network's own name: a run of that name may exist that started without these
        take(config, "run.name", f"from-{base}")


def take_special_tokens(config: DictConfig, overrides: Sequence[str]) -> None:
    """Take the ids of the tokens that begin, end and pad a text from the tokenizer that `data.tokenizer` names, where
    its files name such tokens and `overrides`, the command line, does not.

    Raises: `UserError`, also if the network has too few rows for the tokens."""
    name = config.data.tokenizer
    if name is None:
        return
    brought, other = read_tokenizer(name), []
    check_size(brought.tokenizer, name, config.model.vocab_size)
    given = {each.lstrip("+").partition("=")[0] for each in overrides}
    for key, number in brought.ids.items():
        if f"model.{key}" not in given and config.model[key] != number:
            other.append(f"model.{key}={number}, not {config.model[key]}")
            take(config, f"model.{key}", number)
    if other:
        say(f"note: by data.tokenizer={name}: {', '.join(other)}")


def judge_as_trained(config: DictConfig, overrides: Sequence[str]) -> None:
    """Take from the checkpoint of `init_from` what decides a loss and `overrides`, the command line, left open: of
    ours the task, the precision, the length of a sample and where the text is, as it was trained; of a Hugging
    Face folder whether it is a classifier, and the most positions that it has.

    Raises: `UserError`."""
    if config.init_from is None:
        return
    folder = find_checkpoint(config.init_from, "init_from=")
    given = {each.lstrip("+").partition("=")[0] for each in overrides}
    if (folder / MANIFEST).is_file():
        saved = read_manifest(folder)["config"]
        fields = ("sequence_length", "text_field", "template", "special_tokens")
        taken = {f"data.{name}": saved["data"][name] for name in fields if name in saved["data"]}
        for section in ("task", "precision"):
            if section not in given:
                taken |= {f"{section}.{name}": value for name, value in saved.get(section, {}).items()}
    else:
        positions = model_at(folder, "init_from=").max_position_embeddings
        taken = {"data.sequence_length": min(config.data.sequence_length, positions)}
        if is_classifier(folder) and "task" not in given:
            taken["task.name"] = Task.classify.name
    for key, value in taken.items():
        if key not in given:
            take(config, key, value)


def _require_same(config: DictConfig, name: str, theirs: Any) -> None:
    if name == "word_embed_proj_dim":  # null says the hidden size
        theirs = theirs or config.model.hidden_size
        ours = config.model[name] or config.model.hidden_size
    else:
        ours = config.model[name]
    if ours != theirs:
        raise UserError(
            f"model.{name}={getattr(ours, 'value', ours)}, but init_from={config.init_from} has "
            f"{getattr(theirs, 'value', theirs)}: leave the network's shape to the checkpoint, or choose another one"
            + (f"; model.vocab_size={ours} by itself lets the embedding grow" if name == "vocab_size" else "")
        )


def _require_may_grow(config: DictConfig, rows: int) -> None:
    if config.model.vocab_size > rows and config.task.lora.rank > 0:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the embedding of init_from={config.init_from} has {rows} "
            "rows, and LoRA trains none: let it grow in a run with task.lora.rank=0, and adapt that one's checkpoint"
        )
    if config.model.vocab_size < rows:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the embedding of init_from={config.init_from} has {rows} "
            "rows, and those beyond would be lost with what they learned: name as many or more, or leave it out"
        )


def _tokenizer_of(folder: Path, name: str) -> Path:
    """The folder with the checkpoint's tokenizer, in either of the forms that we load."""
    place = folder / "tokenizer" if (folder / MANIFEST).is_file() else folder
    files = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files:
        return place
    raise UserError(f"init_from={name} has no tokenizer: bring the one it was trained with, data.tokenizer=…")


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's errors in one line that names the key and the way out, and repeats no secret."""
    return masked(_explained(error))


def _explained(error: BaseException) -> str:
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} does not exist: choose {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        why = one_line(Exception(str(error.__cause__ or error).partition("See https")[0]))
        example = '\'key=["a=b", "größe"]\''
        return f"{error.override} is not of Hydra's grammar ({why}): put quotes around each text within it, {example}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and isinstance(cause.parent_node, DictConfig):
        siblings = [str(key) for key in cause.parent_node]
        full_key = str(cause.full_key)
        close = difflib.get_close_matches(str(cause.key), siblings, n=1)
        meant = f"did you mean {full_key.removesuffix(str(cause.key))}{close[0]}?" if close else ""
        return f"{full_key} does not exist: {meant or 'there are ' + ', '.join(siblings)}"
    key = f"{cause.full_key}: " if isinstance(cause, OmegaConfBaseException) and cause.full_key else ""
    return f"{key}{_of_ours(error) or one_line(cause)}"


def _of_ours(error: BaseException | None) -> UserError | None:
    """The mistake that a resolver of ours named, which OmegaConf wraps."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


said_in_one_line = partial(reporting, (HydraException, OmegaConfBaseException), explain)


def to_yaml(run: Run) -> str:
    """What `recorded` says as YAML for Hydra, which reads the same values again: text is escaped."""
    return OmegaConf.to_yaml(OmegaConf.create(verbatim(recorded(run))))


def recorded(run: Run) -> dict[str, Any]:
    """The configuration as it is written beside the run: as `to_dict`, with paths from / on."""
    values = to_dict(run)
    change_paths(values, Run, absolute)
    return values


def to_dict(run: Run) -> dict[str, Any]:
    """The resolved configuration in plain values (enums by name)."""
    return {each.name: _plain(getattr(run, each.name)) for each in fields(run)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value
