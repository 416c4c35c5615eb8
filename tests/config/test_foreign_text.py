"""Text that comes out of files, data and folders' names is data: it is never interpolated, and ends up as it stood."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from classifying import their_model
from command import ROOT, SMALL
from composing import changed, dry, run_of
from omegaconf import OmegaConf

from opt_parallel.config.compose import recorded, run_from, to_dict, to_yaml
from opt_parallel.config.model import Labels
from opt_parallel.config.run import Run
from opt_parallel.config.task import TaskConfig
from opt_parallel.data.encode.classify import find_labels
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.text.records import BadRecord, Record
from opt_parallel.huggingface.card import model_card
from opt_parallel.report.plots import Curve, draw, draw_confusion, draw_curves
from opt_parallel.runtime.errors import UserError

LONG = pytest.mark.long
CANARY = "canary-0123456789-canary"
HOSTILE = [
    "${oc.env:HF_TOKEN}", "${oc.env:HARMLESS}", "B ${x", "${", "}${}", r"\${run.name}", r"\\${run.name}", r"a\b\\",
    "$${run.name}", "${hydra:runtime.cwd}", "{x: 1}", "[a]", "null", "1e3", "a: b # c", "'\"", "- a\n? b", "größe",
    "$x$^",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("HARMLESS", CANARY)  # a name that looks like nothing is not interpolated either


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of transformers of three labels, with a tokenizer, in a folder of a hostile name."""
    folder = tmp_path_factory.mktemp("theirs") / "a ${oc.env:HF_TOKEN} ${x"
    their_model("single", folder)
    save_tokenizer(train_tokenizer(["the quick brown fox"] * 10, 300), folder)
    return folder


def name_labels(folder: Path, names: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["label2id"] = {name: number for number, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))


def a_manifest(folder: Path, **changes: dict[str, Any]) -> Path:
    """A training checkpoint's folder as far as composing reads it: changed sections of its configuration."""
    manifest = json.loads((ROOT / "tests" / "saved_before" / "checkpoint" / "manifest.json").read_text())
    for section, values in changes.items():
        manifest["config"][section] |= values
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def quoted(path: Path) -> str:
    """A folder's name as a user types one that holds OmegaConf's signs."""
    return "'{}'".format(str(path).replace("${", "\\${"))


FIELDS = ["task.label_field", "task.pair_field", "task.prompt_field", "task.completion_field", "data.text_field"]


@pytest.mark.parametrize("texts", [HOSTILE[start::4] for start in range(4)])
def test_any_text_comes_through_a_configuration_as_it_is(texts: list[str]) -> None:
    """A text in each field, and all of them as labels."""
    values = {**dict(zip(FIELDS, texts, strict=False)), "task.labels": HOSTILE}
    run = changed(Run(), values)
    again = run_from(OmegaConf.create(to_yaml(run)))
    for key, value in values.items():
        section, name = key.split(".")
        assert getattr(getattr(run, section), name) == value
        assert getattr(getattr(again, section), name) == value


def test_labels_and_the_folder_of_a_hugging_face_classifier(classifier: Path) -> None:
    names = ["${oc.env:HF_TOKEN}", "B ${x", "${oc.env:HARMLESS}"]
    name_labels(classifier, names)
    run = run_of("task=classify", f"init_from={quoted(classifier)}", "data.sequence_length=16")
    assert run.task.labels == names
    assert run.data.tokenizer == str(classifier)
    assert run.name == "from-a ${oc.env:HF_TOKEN} ${x"
    assert run.folder == Path("runs/from-a ${oc.env:HF_TOKEN} ${x")


@pytest.mark.parametrize(
    "start", [pytest.param(start, marks=LONG if start % 9 else ()) for start in range(0, len(HOSTILE), 3)]
)
def test_what_a_manifest_says_of_its_data_and_its_task(tmp_path: Path, start: int) -> None:
    texts = [HOSTILE[(start + number) % len(HOSTILE)] for number in range(3)]
    said = {"label_field": texts[0], "prompt_field": texts[1], "labels": HOSTILE}
    folder = a_manifest(tmp_path / "checkpoints" / "step-1", data={"text_field": texts[2]}, task=said)
    run = run_of(f"init_from={folder}", "data.validation=x", evaluation=True)
    assert [run.task.label_field, run.task.prompt_field, run.data.text_field] == texts
    assert run.task.labels == HOSTILE


NUMBERS = ["vocab_size", "activation_function", *(pytest.param(key, marks=LONG) for key in ("dropout", "init_std"))]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_manifests_numbers_are_not_looked_up_either(tmp_path: Path, key: str) -> None:
    folder = a_manifest(tmp_path / "checkpoints" / "step-1", model={key: "${oc.env:HARMLESS}"})
    with pytest.raises(Exception, match=r"oc\.env:HARMLESS") as caught:
        run_of(f"init_from={folder}")
    assert CANARY not in str(caught.value)


def test_a_card_shows_it(tmp_path: Path) -> None:
    config = to_dict(Run())
    config["task"]["labels"] = HOSTILE
    manifest = {"config": config, "clock": {"step": 1, "samples": 1, "tokens": 1}}
    card = model_card(Run().model, manifest, [], Labels(tuple(HOSTILE))).decode()
    shown = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert shown["task"]["labels"] == HOSTILE


def test_pictures_show_it(tmp_path: Path) -> None:
    """matplotlib would read what stands between two dollars as a formula, and fail at many."""
    texts = ["$\\frac$ of", "$x$^", "a$b$c^\\q"]
    draw_confusion(tmp_path / "confusion.png", texts[0], texts, np.eye(3))
    draw(tmp_path / "curve.png", texts[0], [{"kind": "train", "step": 1, "loss": 1.0}], None)
    draw_curves(
        tmp_path / "curves.png", texts[1], [Curve(text, ([1], [1.0]), ([], [])) for text in texts], "step", None
    )


def test_pictures_of_names_that_no_font_has_or_that_never_end(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    labels = ["\x1b[31mred\x1b[0m\x07", "a\0b\rc", "日本語", "x" * 100_000]
    draw_confusion(tmp_path / "confusion.png", "y" * 100_000, labels, np.eye(4))
    draw_curves(tmp_path / "curves.png", "\0", [Curve(text, ([1], [1.0]), ([], [])) for text in labels], "step", None)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_label_that_means_a_missing_value(classifier: Path, tmp_path: Path) -> None:
    """OmegaConf has no escape for it: it is refused where it comes in, and not once the run has ended."""
    name_labels(classifier, ["a", "???", "c"])
    with pytest.raises(UserError, match=r"task.labels: '\?\?\?' means a missing value"):
        run_of("task=classify", f"init_from={quoted(classifier)}", "data.sequence_length=16")
    folder = a_manifest(tmp_path / "checkpoints" / "step-1", data={"text_field": "???"})
    with pytest.raises(UserError, match=r"data.text_field: '\?\?\?' means a missing value"):
        run_of(f"init_from={folder}", "data.validation=x", evaluation=True)
    records = [Record(f"line {n}", {"label": label}) for n, label in enumerate(["a", "???"])]
    with pytest.raises(BadRecord, match=r"^line 1: the label '\?\?\?' means a missing value"):
        find_labels(TaskConfig(), records)
    with pytest.raises(BadRecord, match=r"^line 1: the label"):
        find_labels(TaskConfig(), [replace(each, fields={"label": [each.fields["label"]]}) for each in records])


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
@pytest.mark.parametrize(
    "form", ["${oc.env:%s}", "${oc.env:%s,none}", "a-${oc.decode:${oc.env:%s}}", "${oc.env:${u}%s}"]
)
def test_a_secret_of_the_users_own_environment_is_not_interpolated(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, CANARY)
    values = {**to_dict(Run()), "u": ""}
    values["run"]["name"] = form % name
    with pytest.raises(Exception, match=name) as caught:
        run_from(OmegaConf.create(values))
    from opt_parallel.config.compose import explain

    assert "looks like a secret" in explain(caught.value)
    assert CANARY not in explain(caught.value)


def test_other_variables_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    assert run_of("model=opt-tiny", "run.dir=${oc.env:PLACE}/x", "data.cache=${oc.env:NONE,c}").run.dir == "/data/x"
    monkeypatch.setenv("PLACE", "https://user:canary@host")
    with pytest.raises(Exception, match=r"oc\.env:PLACE") as caught:
        run_of("model=opt-tiny", "run.dir=${oc.env:PLACE}/x")
    assert "canary" not in str(caught.value)


def in_the_environment(module: str, function: str, run: Run) -> str:
    """On the crew, with the secret in the environment: what a function of a module prints."""
    work, said = getattr(importlib.import_module(module), function), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setenv("HF_TOKEN", CANARY)
        patch.setenv("HARMLESS", CANARY)
        work(run)
    return said.getvalue()


@pytest.mark.parametrize("trackers", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_planted_secret_reaches_no_file(crew: Any, classifier: Path, tmp_path: Path, trackers: bool) -> None:
    """By labels of a config.json and of data, a folder's name and a manifest's fields: no file, and no terminal."""
    name_labels(classifier, ["${oc.env:HF_TOKEN}", "B ${x", "${oc.env:HARMLESS}"])
    names = ["${oc.env:HF_TOKEN}", "B ${x", "${oc.env:HARMLESS}"] * 10
    text = tmp_path / "${oc.env:HF_TOKEN}.jsonl"
    text.write_text("".join(json.dumps({"text": f"the fox {n}", "label": name}) + "\n" for n, name in enumerate(names)))
    arguments = [
        *SMALL[1:], "task=classify", f"init_from={quoted(classifier)}", f"data.train={quoted(text)}", "steps=1",
        f"data.validation={quoted(text)}", "evaluation.every=1", f"data.cache={tmp_path}/cache", "export.at_end=true",
        f"run.dir='{tmp_path}/run \\${{oc.env:HF_TOKEN}} \\${{x'",
        *(["logging.wandb=offline", "logging.tensorboard=true"] if trackers else []),
    ]  # fmt: skip
    said = crew(1)(in_the_environment, "opt_parallel.loop", "train", run_of(*arguments, tokenizer=True))
    run = tmp_path / "run ${oc.env:HF_TOKEN} ${x"
    places = [f"init_from={quoted(run / 'checkpoints' / 'step-1')}", f"data.validation={quoted(text)}"]
    judged = run_of(*places, f"run.dir={tmp_path}/judged", f"data.cache={tmp_path}/cache", evaluation=True)
    said += crew(1)(in_the_environment, "opt_parallel.tools.evaluate", "evaluate", judged)
    systems = (["launch=slurm"], ["launch=kubernetes", "launch.name=a", "launch.image=b", "launch.claim=c"])
    rendered = [dry(*system, *arguments) for system in systems]
    assert not [text for text in rendered if CANARY in text]
    assert not [text for text in said if CANARY in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "README.md", "manifest.json", "evaluation.json"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files) == trackers
    assert any(path.suffix == ".wandb" for path in files) == trackers
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    exported = json.loads((run / "export" / "config.json").read_text())
    assert set(exported["label2id"]) == set(names)
    assert recorded(run_from(OmegaConf.load(run / "config.yaml")))["task"]["labels"] == names[:3]
