"""Every key and every option that names a file or a folder × what may be wrong with it: a table of what is said."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, python, write_text
from composing import (
    FILES,
    SCRIPTS,
    changed,
    dry,
    load_script,
    mistake_before_hydra_writes,
    options_of,
    path_keys,
    run_of,
)
from hugging_face import random_model
from metaseq_forms import Size, weights_of, write
from rights import ordinary_rights

from opt_parallel.checkpoint.folders import choose
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.options import name_of, parsed
from opt_parallel.config.run import Run
from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.data.prepare import corpora, prepare_tokenizer
from opt_parallel.data.store.cache import build_once, cached
from opt_parallel.huggingface.tokenizer import read_tokenizer
from opt_parallel.launching.settings import SECTIONS
from opt_parallel.metaseq.md5 import read_sums
from opt_parallel.preflight import make_run_folder
from opt_parallel.runtime.errors import UserError

SIGNS = "a=b (c) [d] #e ~ ßé,{f};'g' $h%"
CASES = ["closed folder", "unreadable", "unreadable files", "read-only", "missing", "~", "signs"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One of everything in `good`, and again in a closed folder, at home, under signs, and unreadable."""
    base = tmp_path_factory.mktemp("tree")
    good = base / "good"
    good.mkdir()
    write_text(good)
    save_tokenizer(train_tokenizer([(good / "text.jsonl").read_text()], 300), good / "model")
    shutil.copytree(good / "model", good / "tokenizer")
    (good / "texts").mkdir()
    write_text(good / "texts")
    (good / "out").mkdir()
    random_model({"vocab_size": 300}).save_pretrained(good / "model")
    shutil.copytree(ROOT / "tests" / "saved_before" / "checkpoint", good / "run" / "checkpoints" / "step-4")
    row = {"kind": "train", "step": 1, "samples": 1, "tokens": 1, "loss": 1.0}
    (good / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write("singleton", good / "metaseq", Size(), weights_of(Size()))
    (good / "sums").write_text("d41d8cd98f00b204e9800998ecf8427e  restored.pt\n")
    (good / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    shutil.copy(ROOT / "launch" / "accelerate" / "cpu-one.yaml", good / "accelerate.yaml")
    (good / "prompts.txt").write_text("x\n")
    (good / "answers.jsonl").write_text('{"prompt": "a", "text": "a"}\n')
    (good / "data").mkdir()
    for name in ("labels-train", "labels-validation", "pairs-train", "pairs-validation"):
        rows = [{"text": "a b", "label": label, "prompt": "a", "completion": "a"} for label in "ab" * 20]
        (good / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (good / "wordnet").mkdir()
    for name in ("noun", "verb", "adj", "adv"):
        lines = [f"{n:08} 03 n 01 word{n} 0 000 | gloss {n} of {n * n}\n" for n in range(60)]
        (good / "wordnet" / f"data.{name}").write_text("".join(lines))
    for other in ("closed", "home", SIGNS, "unreadable", "unreadable files", "read-only"):
        shutil.copytree(good, base / other)
    files = [path for path in (base / "unreadable files").rglob("*") if path.is_file()]
    for path in [base / "closed", *(base / "unreadable").iterdir(), *files]:
        path.chmod(0)
    for path in [base / "read-only", *(base / "read-only").rglob("*")]:
        path.chmod(0o555)
    yield base
    for path in [
        base / "closed",
        *(base / "unreadable").iterdir(),
        base / "read-only",
        *(base / "read-only").rglob("*"),
    ]:
        path.chmod(0o755)


@pytest.fixture(autouse=True)
def _ordinary(monkeypatch: pytest.MonkeyPatch, tree: Path, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tree / "home"))
    monkeypatch.chdir(tmp_path)
    with ordinary_rights():
        yield


def value_in(case: str, tree: Path, item: str | None) -> str:
    """What the user gives."""
    name = item or "out"
    folder = {"closed folder": "closed", "~": "~", "signs": SIGNS}.get(case, case)
    return f"~/{name}" if case == "~" else str(tree / folder / name)


def is_fine(case: str, item: str | None) -> bool:
    return case in (["~", "signs", "missing", "unreadable files"] if item is None else ["~", "signs", "read-only"])


@pytest.fixture(scope="module")
def composed(tree: Path) -> Callable[[str], Run]:
    """`composed(case)`: the run with the case's value at each key but init_from, which would be read.

    The command line of the case `signs` is composed by Hydra."""

    @functools.cache
    def of_case(case: str) -> Run:
        fixed = ["model=opt-tiny", "precision=fp32", "data.workers=1"]
        values = {key: value_in(case, tree, item) for key, (item, _) in KEYS.items() if key != "init_from"}
        if case == "signs":
            return run_of(*fixed, *(f"{key}={value}" for key, value in values.items()))
        return changed(plain, values)

    plain = run_of("model=opt-tiny", "precision=fp32", "data.workers=1")

    return of_case


def use_text(key: str) -> Callable[[Run], Any]:
    """Finds the texts of `key`, beside which the other key has none of the case's."""

    def use(run: Run) -> list[Path]:
        others = {"train": str(write_text(Path.cwd())), "validation": None}
        others.pop(key.removeprefix("data."))
        found = [corpus for corpus in corpora(replace(run.data, **others)) if corpus.key == key]
        return [path for corpus in found for path in corpus.files]

    return use


def use_cache(run: Run) -> Path:
    folder = cached(run.data.cache, "kind", [])
    return build_once(folder, lambda partial: (partial / "file").write_text("")).parent


def use_tokenizer(run: Run) -> Path:
    prepare_tokenizer(replace(run, data=replace(run.data, cache=str(Path.cwd() / "cache"))), [])
    return Path(str(run.data.tokenizer))


def use_numbering(run: Run) -> Path:
    named = run.data.train_sources[0].ids_of or ""
    read_tokenizer(named)
    return Path(named)


def use_folder(run: Run) -> Path:
    choose("auto", run.folder)
    make_run_folder(run.folder)
    return run.folder


def use_resume(run: Run) -> Path | None:
    return choose(run.resume, Path("none"))


def use_start(value: str) -> Path:
    run = run_of("precision=fp32", "data.workers=1", f"init_from={value}", "data.sequence_length=16")
    open_checkpoint(str(run.init_from), "init_from=").check_language_model()
    return Path(str(run.init_from))


def use_sums(run: Run) -> Path:
    assert list(read_sums("init_md5=", str(run.init_md5))) == ["restored.pt"]
    return Path(str(run.init_md5))


# what lies at a key's value, None: it is made; and what a command does with it, as far as it is looked at;
# of init_from with the value, of the others with the run
KEYS: dict[str, tuple[str | None, Callable[[str], Any]]] = {
    "data.train": ("texts", use_text("data.train")),
    "data.validation": ("text.jsonl", use_text("data.validation")),
    "data.tokenizer": ("tokenizer", use_tokenizer),
    "data.ids_of": ("tokenizer", use_numbering),
    "data.cache": (None, use_cache),
    "run.dir": (None, use_folder),
    "init_from": ("model", use_start),
    "init_md5": ("sums", use_sums),
    "resume": ("run/checkpoints/step-4", use_resume),
}
# of launch/submit.py, with what lies there and the words that its system needs
LAUNCH_KEYS = {
    "launch.hostfile": ("hosts", "launch=deepspeed launch.nodes=2"),
    "launch.config": ("accelerate.yaml", "launch=accelerate"),
    "launch.venv": (None, "launch=slurm"),
}
# what lies at an option's value, None: it is made; and the other words of a command that comes to use it
OPTIONS: dict[tuple[str, str | None, str], tuple[str | None, str]] = {
    ("benchmark", "train", "--output"): (None, "train model=opt-tiny batch.micro=1 precision=fp32"),
    ("benchmark", "checkpoint", "--output"): (None, "checkpoint model=opt-tiny precision=fp32"),
    ("benchmark", "resume", "--output"): (None, "resume --processes 2 model=opt-tiny"),
    ("benchmark", "prepare", "--output"): (None, "prepare --megabytes 1"),
    ("benchmark", "convert", "--checkpoint"): ("model", "convert --rounds 1 --output new"),
    ("benchmark", "convert", "--output"): (None, "convert --rounds 1 --checkpoint good/model"),
    ("benchmark", "memory", "--page"): ("text.jsonl", "memory model=opt-tiny"),
    ("checkpoint", "list", "run"): ("run", "list"),
    ("checkpoint", "show", "folder"): ("run/checkpoints/step-4", "show"),
    ("checkpoint", "verify", "folder"): ("run/checkpoints/step-4", "verify"),
    ("checkpoint", "diff", "a"): ("run/checkpoints/step-4", "diff VALUE good/run/checkpoints/step-4"),
    ("checkpoint", "diff", "b"): ("run/checkpoints/step-4", "diff good/run/checkpoints/step-4"),
    ("compare", None, "RUN"): ("run", ""),
    ("compare", None, "--output"): (None, "good/run"),
    ("demo_text", None, "--output"): (None, "--source good/texts"),
    ("demo_text", None, "--source"): ("texts", "--output new"),
    ("export", None, "--checkpoint"): ("model", "--output new"),
    ("export", None, "--output"): (None, "--checkpoint good/model"),
    ("export", None, "--md5"): ("sums", "--checkpoint good/metaseq --output new"),
    ("generate", None, "--checkpoint"): ("model", "--prompt x"),
    ("generate", None, "--prompts-file"): ("prompts.txt", "--checkpoint good/model"),
    ("generate", None, "--output"): (None, "--checkpoint good/model --prompt x --max-new-tokens 1"),
    ("plan", None, "--picture"): (None, "model=opt-tiny"),
    ("tokenizer", None, "--input"): ("texts", "--vocab-size 300 --output new"),
    ("tokenizer", None, "--output"): (None, "--vocab-size 300 --input good/text.jsonl"),
    ("verify", None, "--checkpoint"): ("model", ""),
    ("verify", None, "--against"): ("model", "--checkpoint good/model"),
    ("verify", None, "--md5"): ("sums", "--checkpoint good/metaseq"),
    ("wordnet_baselines", None, "--data"): ("data", ""),
    ("wordnet_baselines", None, "--answers"): ("answers.jsonl", "--data good/data"),
    ("wordnet_text", None, "--output"): (None, "--source good/wordnet"),
    ("wordnet_text", None, "--source"): ("wordnet", "--output new"),
}
TEXTS_OF_SCRIPTS = {  # options whose text names no file
    "--contenders", "--dtype", "--max-shard-size", "--name", "--over", "--precision", "--prompt", "--text-field",
    "key=value",
}  # fmt: skip


def test_no_key_is_forgotten() -> None:
    assert set(KEYS) == set(path_keys(Run))
    assert set(LAUNCH_KEYS) == {key for section in SECTIONS.values() for key in path_keys(section, "launch.")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", KEYS)
def test_a_key(tree: Path, composed: Callable[[str], Run], key: str, case: str) -> None:
    item, use = KEYS[key]
    value = value_in(case, tree, item)
    given = value if key == "init_from" else composed(case)
    if is_fine(case, item):
        expected = Path(value.replace("~", str(tree / "home")) if case == "~" else value)
        taken = use(given)
        print(f"{key} | {case} | taken")
        assert expected.exists()
        paths = [taken] if isinstance(taken, Path) else taken
        assert all(path == expected or expected in path.parents for path in paths)
        return
    with pytest.raises(UserError) as caught:
        use(given)
    check_line(str(caught.value), tree, key, case, value)


def launch_cell(key: str, case: str) -> Any:
    """Nobody looks at what lies at launch.venv, so only the path itself matters."""
    fast = key != "launch.venv" or case in ("missing", "~", "signs")
    return pytest.param(key, case, marks=() if fast else pytest.mark.long)


LAUNCH_CELLS = [launch_cell(key, case) for key in LAUNCH_KEYS for case in CASES]


@pytest.mark.parametrize(("key", "case"), LAUNCH_CELLS)
def test_a_key_of_launching(tree: Path, key: str, case: str) -> None:
    item, words = LAUNCH_KEYS[key]
    value = value_in(case, tree, item)
    arguments = [*words.split(), f"{key}={value}", "model=opt-tiny"]
    if is_fine(case, item) or item is None:  # an environment may be there on the nodes alone
        expected = value.replace("~", str(tree / "home")) if case == "~" else value
        assert expected in "".join(shlex.split(dry(*arguments), comments=True))
        print(f"{key} | {case} | taken")
        return
    with pytest.raises(UserError) as caught:
        dry(*arguments)
    check_line(str(caught.value), tree, key, case, value)


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_hydras_own_folders(tree: Path, key: str) -> None:
    """Which it makes before a run begins."""
    several = ["-m", "seed=1"] if key == "hydra.sweep.dir" else []
    value = f"{tree}/closed/out"
    done = python("tests/support/rights.py", "train.py", *several, "model=opt-tiny", f"{key}={value}")
    print(f"{key} | {value.replace(str(tree), '…')} | {done.stderr.strip().replace(str(tree), '…')}")
    assert done.returncode == 2
    assert f"{key}={value}" in done.stderr
    assert "Permission denied" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
@pytest.mark.parametrize(("value", "words"), [("~/out", "home/out"), ("s3://bucket/out", "is a URL")])
def test_hydras_own_folders_elsewhere(key: str, value: str, words: str) -> None:
    line = mistake_before_hydra_writes("model=opt-tiny", f"{key}={value}")
    assert line.startswith(f"{key}={value}")
    assert words in line
    assert "\n" not in line


def test_hydras_folder_within_a_runs() -> None:
    done = python("train.py", "model=opt-tiny", "hydra.output_subdir=s3://bucket/out")
    assert (done.returncode, done.stderr[:49]) == (2, "error: hydra.output_subdir=s3://bucket/out is a U")
    assert not (ROOT / "s3:").exists()


def check_line(line: str, tree: Path, key: str, case: str, value: str) -> None:
    print(f"{key} | {case} | {line.replace(str(tree), '…')}")
    assert value in line
    assert key in line or not key.startswith("--")
    assert "\n" not in line


def test_every_script_reads_its_options_through_the_one_door() -> None:
    """Which argparse's own `parse_args` would pass by."""
    for path in FILES:
        source = path.read_text()
        assert "parse_args" not in source
        assert ("argparse.ArgumentParser(" in source) == (path in SCRIPTS.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_is_forgotten(script: str) -> None:
    numbers = {"_positive", "int", "float"}
    for verb, action in options_of(script):
        name = name_of(action)
        if (
            name in TEXTS_OF_SCRIPTS
            or action.choices
            or action.nargs == 0
            or getattr(action.type, "__name__", "") in numbers
        ):
            continue
        assert (script, verb, name) in OPTIONS, f"is {name} of {script} a path?"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: "-".join(filter(None, option)))
def test_an_option(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, option: tuple[str, str | None, str], case: str
) -> None:
    (script, _, name), (item, others) = option, OPTIONS[option]
    value, module = value_in(case, tree, item), load_script(script)
    words = [str(tree / word) if word.startswith("good/") else word for word in others.split()]
    given = [value] if not name.startswith("-") else [f"{name}={value}"]
    words = [value if word == "VALUE" else word for word in words] if "VALUE" in words else [*words, *given]
    monkeypatch.setattr(sys, "argv", [script, *words])
    if is_fine(case, item):
        monkeypatch.setattr(module, "parsed", lambda parser: pytest.exit(str(vars(parsed(parser)))))
        by_name = OPTIONS[option][0] in ("model", "texts") and name != "--source"  # hub ids, too: `reach` comes later
        expected = value.replace("~", str(tree / "home")) if case == "~" and not by_name else value.removeprefix("~")
        with pytest.raises(pytest.exit.Exception, match=re.escape(expected)):
            module.main()
        print(f"{script} {name} | {case} | taken")
        return
    try:
        status = module.main()
    except UserError as error:
        said = str(error)
    except PermissionError as error:  # one line by `reporting`
        said = error.filename
    else:  # scripts/checkpoint.py verify: damage is its answer
        assert status == 1
        said = capsys.readouterr().out.strip()
    check_line(said, tree, name, case, value)
