"""A URL is no path: it is refused in every key and option that names a file or a folder, and nothing is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from command import python, small
from composing import SCRIPTS, changed, dry, load_script, options_of, path_keys, run_of

from opt_parallel.config.options import name_of
from opt_parallel.config.paths import local
from opt_parallel.config.run import Run
from opt_parallel.launching.settings import SECTIONS
from opt_parallel.runtime.errors import UserError

URLS = [
    "s3://bucket/x", "S3://bucket/x", "s3a://bucket", "gs://bucket/x", "az://c/x", "abfss://c@account.dfs/x",
    "file:///data/x", "file:/data/x", "hdfs://name:9000/x", "https://example.com/x.jsonl", "http://h", "ftp://h/x",
    "dbfs:/mnt/x", "hf://datasets/a/b", "r2://b/x", "oss://b/x", "ssh://host/x", "memory://x", "gcs://b", " s3://b/x",
]  # fmt: skip
PATHS = [
    "a:b",
    "/data/12:30/x",
    "C:/x",
    "./s3:/b",
    "x/s3://b",
    "host:/export",
    "a:",
    ":a",
    "c:\\x",
    "1:2:3",
    "runs/a=b:c",
    "a:b/c d",
]
LAUNCHES = {
    "launch.hostfile": ["launch=deepspeed", "launch.nodes=2"],
    "launch.config": ["launch=accelerate"],
    "launch.venv": ["launch=slurm"],
}


def refused(work: Any, key: str, url: str) -> str:
    with pytest.raises(UserError) as caught:
        work()
    line = str(caught.value)
    assert line.startswith(f"{key}{url}")
    assert "is a URL" in line
    assert "\n" not in line
    return line


def test_a_path_that_holds_a_colon_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [local("run.dir=", path) for path in PATHS] == PATHS
    for folder, cache in zip(PATHS[::2], PATHS[1::2], strict=True):
        run = changed(Run(), {"run.dir": folder, "data.cache": cache})
        assert (run.run.dir, run.data.cache) == (folder, cache)
    run = run_of("model=opt-tiny", f"run.dir={PATHS[-2]}", f"data.cache={PATHS[-1]}")
    assert (run.run.dir, run.data.cache) == tuple(PATHS[-2:])


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_no_path(url: str) -> None:
    refused(lambda: local("run.dir=", url), "run.dir=", url)


@pytest.mark.parametrize("share", [0, *(pytest.param(share, marks=pytest.mark.long) for share in range(1, 4))])
@pytest.mark.parametrize("key", path_keys(Run))
def test_in_every_key(key: str, share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in URLS[(share + path_keys(Run).index(key)) % 4 :: 4]:
        forms = [
            url,
            *([[{"path": url}], ["a", url], {"path": ["a", url]}] if key in ("data.train", "data.validation") else []),
        ]
        for form in forms:
            line = refused(lambda form=form: changed(Run(), {key: form}), f"{key}=", url)
        print(f"{key} | {line}")
    if share or key in ("init_from", "data.tokenizer"):  # which are read before the run is checked
        refused(lambda: run_of("model=opt-tiny", f"{key}={URLS[0]}", tokenizer=True), f"{key}=", URLS[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", [key for section in SECTIONS.values() for key in path_keys(section, "launch.")])
def test_in_every_key_of_launching(key: str) -> None:
    for url in URLS[::12]:
        print(refused(lambda url=url: dry(*LAUNCHES[key], f"{key}={url}", "model=opt-tiny"), f"{key}=", url.strip()))


def test_in_a_run_that_is_submitted() -> None:
    refused(lambda: dry("launch=slurm", "model=opt-tiny", f"run.dir={URLS[0]}"), "run.dir=", URLS[0])
    assert "docker://image" in dry("launch=slurm", "launch.container=docker://image", "model=opt-tiny")


@pytest.mark.parametrize("script", SCRIPTS)
def test_in_every_option(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = load_script(script)
    for verb, action in options_of(script):
        if action.type is not Path:
            continue
        name = name_of(action)
        for url in URLS:
            word = [f"{name}={url}"] if name.startswith("-") else [url] * (2 if verb == "diff" else 1)
            monkeypatch.setattr(sys, "argv", [script, *([verb] if verb else []), *word])
            line = refused(module.main, "a " if name == "b" else f"{name} ", url)
        print(f"{script} {verb or ''} | {line}")
    assert not list(tmp_path.iterdir())


def test_where_a_hub_id_may_stand_too(monkeypatch: pytest.MonkeyPatch) -> None:
    generate, tokenizer = load_script("generate"), load_script("tokenizer")
    for url in URLS:
        monkeypatch.setattr(sys, "argv", ["generate", "--prompt", "https://example.com", "--checkpoint", url])
        refused(generate.main, "--checkpoint ", url)
        monkeypatch.setattr(sys, "argv", ["x", "--vocab-size", "300", "--output", "new", "--input", "a", url])
        with pytest.raises(UserError, match=r"no such file|is a URL"):
            tokenizer.main()
    page = "https://huggingface.co/facebook/opt-125m/tree/main"
    with pytest.raises(UserError, match="write init_from=facebook/opt-125m"):
        run_of("model=opt-tiny", f"init_from={page}")


def test_a_real_command_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [word for word in small(tmp_path) if not word.startswith("run.dir")]
    before = sorted(tmp_path.rglob("*"))
    done = python("train.py", *arguments, "run.dir=s3://bucket/x")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: run.dir=s3://bucket/x is a URL")
    assert sorted(tmp_path.rglob("*")) == before
