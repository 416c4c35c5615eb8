"""Numbers that no key takes, and texts that are typed as they are meant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command import python
from composing import SCRIPTS, changed, dry, options_of, parser_of, run_of
from hydra.core.override_parser.overrides_parser import OverridesParser

from opt_parallel.config.compose import TEXTS, explain
from opt_parallel.config.options import name_of, parsed
from opt_parallel.config.overrides import checked
from opt_parallel.config.paths import typed_fields
from opt_parallel.config.run import Run
from opt_parallel.config.task import TaskConfig
from opt_parallel.launching.settings import SECTIONS
from opt_parallel.runtime.errors import UserError

HUGE = "9" * 401
NUMBERS = [key for key, _, kind in typed_fields(Run) if kind in (int, float, int | None, float | None)]
NUMBERS += ["batch.global", "batch.micro"]
LAUNCH_NUMBERS = sorted({
    (system.name, key) for system, section in SECTIONS.items() for key, _, kind in typed_fields(section, "launch.")
    if kind in (int, int | None)
})  # fmt: skip
SIGNS = [
    "lang=en/t.jsonl", "größe/t", "2023", "1e3", "true", "007", "1_000", ".5", "-5", "~/x", "a b", "a(b)", "a#b",
    "x[1]", "[1]x", "a'b", 'a"b', "a\\'b", "a;b\\", "a\\", "{a}b", "'a", "(a", "a|b", "a&b", "a<b>", "a!b?",
    "a*b", "日本語", "runs/optimizer.lr=0.003,model.dropout=0/step-1", "inf", "nan", "a:b", "%a%", "$a",
    "@a", "^a`", "a\u00a0b",
]  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_key_takes_a_number_without_end(key: str) -> None:
    for value in ("inf", "-inf", "nan", HUGE, f"-{HUGE}", "9" * 5000, "1e400", "1e309", "9223372036854775808"):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            run_of(f"{key}={value}")
        line = explain(caught.value) if not isinstance(caught.value, UserError) else str(caught.value)
        assert line.startswith(key), line
        assert "\n" not in line
        assert len(line) < 500


# Each key is tested with one of three numbers, another one than its neighbours.
@pytest.mark.parametrize("share", [0, *(pytest.param(share, marks=pytest.mark.long) for share in (1, 2))])
@pytest.mark.parametrize("key", NUMBERS)
def test_nor_from_a_file(key: str, share: int) -> None:
    value = (10**400, float("inf"), float("nan"))[(share + NUMBERS.index(key)) % 3]
    with pytest.raises(UserError, match=f"^{key}"):
        changed(Run(), {key: value})


@pytest.mark.parametrize(("system", "key"), LAUNCH_NUMBERS)
def test_nor_to_launch(system: str, key: str) -> None:
    for value in ("inf", HUGE):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            dry(f"launch={system}", f"{key}={value}", "model=opt-tiny")
        line = explain(caught.value) if not isinstance(caught.value, UserError) else str(caught.value)
        assert line.startswith(key), line


@pytest.mark.parametrize("script", SCRIPTS)
def test_nor_an_option(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(script)
    for verb, action in [each for each in options if each[1].type in (int, float)]:
        needed = [each for of, each in options if of == verb and each.required and each is not action]
        words = [word for each in needed for word in (*each.option_strings, "1" if each.type is int else "x")]
        for value in ("inf", "nan", HUGE):
            argv = [script, *([verb] if verb else []), *words, name_of(action), value]
            monkeypatch.setattr(sys, "argv", argv)
            with pytest.raises((UserError, SystemExit)) as caught:
                parsed(parser_of(script))
            said = str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err
            assert name_of(action) in said


def read(argument: str) -> Any:
    """The value that Hydra reads from an argument that is checked and quoted."""
    (quoted,) = checked([argument], TEXTS)
    return OverridesParser.create().parse_override(quoted).value()


def test_weights_of_sources() -> None:
    for weight in (HUGE, f"'{HUGE}'", "inf", "nan", "'inf'", "1e400"):
        with pytest.raises(UserError, match=r"data\.train"):
            changed(Run(), {"data.train": read(f"data.train=[{{path: a, weight: {weight}}}]")})


@pytest.mark.parametrize("text", SIGNS)
def test_what_follows_a_text_keys_sign_is_the_text(text: str) -> None:
    for key in ("run.name", "data.text_field", "data.train", "run.dir", "init_from"):
        (argument,) = checked([f"{key}={text}"], TEXTS)
        assert read(f"{key}={text}") == text
        assert checked([argument], TEXTS) == [argument]  # as it comes to train.py through a launcher


def test_hydras_own_forms_are_left_alone() -> None:
    for argument in (
        "data.train=[a,b]", "data.train={path: a}", "run.name='a=b'", 'run.name="a=b"', "init_from=null", "~run.name",
        "run.name=${model}", "steps=1e3", "model=opt-tiny", "+x=1", "data.train=[größe]", "-m", "--config-dir=/x",
    ):  # fmt: skip
        assert checked([argument], TEXTS) == [argument]
    for argument in ("run.name=a,b", "run.name=choice(a,b)", "run.name=1,2", "data.train=a=b,c=d"):
        assert checked(["-m", argument], TEXTS) == ["-m", argument]


def test_a_list_that_hydra_does_not_read_says_how_to_write_it() -> None:
    done = python("scripts/prepare.py", "model=opt-tiny", "data.train=[größe/a,b]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.train=[größe/a,b] does not follow Hydra's grammar")
    assert '["a=b"' in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "names"),
    [("[false,true]", ["false", "true"]), ("[False,TRUE]", ["false", "true"]), ("[0,1]", ["0", "1"]),
     ("[a,true,2,0.5]", ["a", "true", "2", "0.5"]), ("['False',b]", ["False", "b"])],
)  # fmt: skip
def test_labels_are_named_as_data_names_them(typed: str, names: list[str]) -> None:
    values = {"task.name": "classify", "data.tokenizer": "x", "task.labels": read(f"task.labels={typed}")}
    assert changed(Run(), values).task.labels == names
    with pytest.raises(UserError, match="put it in quotes"):
        TaskConfig(labels=[None, "a"])


def test_paths_are_recorded_from_the_root_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opt_parallel.config.compose import recorded

    monkeypatch.chdir(tmp_path)
    for name in ("model", "runs", "a=b", "d[1]"):
        (tmp_path / name).mkdir()
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a"}))
    run = run_of(
        "model=opt-tiny", "run.dir=runs", "data.tokenizer=model", "data.cache=a=b", "resume=never",
        "data.train=[t.jsonl,'*.jsonl',python:train,someone/data]",
        "data.validation=[{path: [t.jsonl, nothing/here]}]",
    )  # fmt: skip
    values = recorded(run)
    assert values["run"]["dir"] == str(tmp_path / "runs")
    assert values["data"]["tokenizer"] == str(tmp_path / "model")
    assert values["data"]["cache"] == str(tmp_path / "a=b")
    assert values["data"]["train"] == [f"{tmp_path}/t.jsonl", f"{tmp_path}/*.jsonl", "python:train", "someone/data"]
    assert values["data"]["validation"] == [{"path": [f"{tmp_path}/t.jsonl", "nothing/here"]}]
    assert (values["resume"], values["init_from"]) == ("never", None)
    assert run.folder == Path("runs")  # as it was typed, in messages
