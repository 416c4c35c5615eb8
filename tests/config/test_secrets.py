"""Secrets come from the environment alone, and end up nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import launch, python, small
from composing import SCRIPTS, changed, options_of, parser_of
from omegaconf import OmegaConf

from opt_parallel.config.compose import TEXTS, run_from, to_dict
from opt_parallel.config.options import name_of, parsed
from opt_parallel.config.overrides import checked
from opt_parallel.config.paths import text_keys, typed_fields
from opt_parallel.config.run import Run
from opt_parallel.config.secrets import looks_secret, masked, secrets_in
from opt_parallel.config.values import check_values
from opt_parallel.launching.settings import SECTIONS
from opt_parallel.launching.submit import LAUNCH_TEXTS
from opt_parallel.report.trackers import open_trackers
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.errors import UserError

CANARY = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00"  # as wandb's keys look


@pytest.mark.parametrize(
    "argument",
    [
        f"+wandb_api_key={CANARY}",
        f"+logging.wandb.apikey={CANARY}",
        f"++run.password={CANARY}",
        f"--hf_token={CANARY}",
        f"data.train=[{{path: text.jsonl, hf_token: {CANARY}}}]",
        f"+hydra.job.env_set.HF_TOKEN={CANARY}",
    ],
)
def test_a_key_that_looks_like_a_secret_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match="looks like a secret") as caught:
        checked(["model=opt-tiny", argument], TEXTS)
    assert "set an environment variable" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_before_anything_is_written(tmp_path: Path) -> None:
    argument = f"data.train=[{{path: text.jsonl, hf_token: {CANARY}}}]"
    process = python("train.py", "-m", *small(tmp_path), argument, "seed=1,2", f"hydra.sweep.dir={tmp_path / 'run'}")
    assert process.returncode == 2
    assert process.stderr.startswith("error: data.train.hf_token looks like a secret")
    assert process.stderr.count("\n") == 1
    assert CANARY not in process.stderr + process.stdout
    assert not (tmp_path / "run").exists()


def test_text_that_speaks_of_passwords_is_text() -> None:
    argument = 'evaluation.prompts=["The password: a token=1", "{secret: 2}", "https://host:80/a@b"]'
    assert checked([argument], TEXTS) == [argument]


def test_in_a_file_of_the_users_too() -> None:
    """Where Hydra never shows us a command line: an experiment's YAML."""
    config: Any = OmegaConf.create({**to_dict(Run()), "data": {"train": [{"path": "x", "api_key": CANARY}]}})
    with pytest.raises(UserError, match=r"data\.train\.api_key looks like a secret") as caught:
        run_from(config)
    assert CANARY not in str(caught.value)


def test_no_key_of_ours_looks_like_one() -> None:
    def keys(values: dict[str, Any]) -> list[str]:
        return [k for key, value in values.items() for k in [key, *(keys(value) if isinstance(value, dict) else [])]]

    ours = keys(to_dict(Run()))
    assert {"eos_token_id", "max_new_tokens", "warmup_tokens", "tokenizer"} <= set(ours)
    assert not [key for key in ours if looks_secret(key)]
    assert all(
        looks_secret(key)
        for key in ("token", "HF_TOKEN", "db_password", "passwd", "apikey", "client_secret", "SSH_KEY")
    )


VARIABLES = {"WANDB_API_KEY": CANARY, "HF_TOKEN": "hf_canaryCanaryCanary", "DB_PASSWORD": "a canary's password"}


def files_without_variables(folder: Path) -> list[Path]:
    """All files of the folder. None of them may hold one of the secrets in the environment."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        for name, secret in VARIABLES.items():
            assert secret.encode() not in path.read_bytes(), f"{path} holds {name}"
    return files


def test_what_the_environment_holds_is_written_nowhere(tmp_path: Path) -> None:
    arguments = [*small(tmp_path), "steps=1", f"hydra.sweep.dir={tmp_path / 'run'}", "seed=1"]
    process = launch(1, "train.py", "-m", *arguments, **VARIABLES)
    assert process.returncode == 0, process.stderr
    names = {path.name for path in files_without_variables(tmp_path / "run")}
    assert {"config.yaml", "multirun.yaml", "metrics.jsonl", "rank-00000.log", "manifest.json"} <= names
    for secret in VARIABLES.values():
        assert secret not in process.stdout + process.stderr


def test_what_the_environment_holds_reaches_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name, value in {**VARIABLES, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    trackers = open_trackers(changed(Run(), {"run.dir": str(tmp_path / "run"), "logging.wandb": "offline"}), Clock())
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    wandb.teardown()  # its service has written everything when it has ended
    files = files_without_variables(tmp_path)
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)


# what a user may type, each with CANARY or another word for the secret in it
SECRETS = [
    f"https://example.com/x.jsonl?sig={CANARY}", f"https://user:{CANARY}@example.com/x", f"s3://key:{CANARY}@bucket/x",
    f"https://b.s3.amazonaws.com/x?a=1&X-Amz-Signature={CANARY}&b=2", f"https://example.com/x?token={CANARY}#y",
    f"https://example.com/?access_token={CANARY}", f"https://{CANARY}@github.com/x", f"https://h/x?Signature={CANARY}",
    f"postgres://user:{CANARY}/x@host/base", f"AccountName=a;AccountKey={CANARY}==", f"token={CANARY}",
    f"user:{CANARY}@host:29500", f"Authorization: Bearer {CANARY}", "hf_canaryCanaryCanaryCanaryCanaryCanary",
    f"https://storage.googleapis.com/x?X-Goog-Credential={CANARY}", "ghp_canaryCanaryCanaryCanaryCanaryCanary",
    f"x https://a.blob.core.windows.net/c?sv=1&sig={CANARY}%3D y", "AKIACANARYCANARYCANA", f"$SECRET_OF_TEST-{CANARY}",
    "sk-proj-canaryCanary0123456789canary", "sk-canary0123456789CANARY0123456789", "glpat-canaryCANARY0123canary",
    "xoxb-0123456789-canary", "AIzaSycanaryCANARY0123456789canaryCANARY", "ASIACANARYCANARYCANA",
    f"x --password {CANARY}",
    "npm_canaryCANARY0123456789canaryCANARYcanary", "pypi-AgEIcanaryCANARY0123456789canaryCANARY",
    "wandb_v1_canaryCANARY0123456789canary", "nvapi-canaryCANARY0123456789canary", f"Bearer {CANARY}",
    "api_org_canaryCanaryCanaryCanary", f"//user:{CANARY}@host/x", f"https://host/x?a=1&%73ig={CANARY}",
    f"AWS4-HMAC-SHA256 Credential=canary/20230101, Signature={CANARY}",
]  # fmt: skip
HARMLESS = [
    "/data/a:b/c", "lang=en/t.jsonl", "key=abcdefgh/x", "The password: a token=1", "https://host:80/a@b", "a@b.de",
    "registry.example:5000/opt@sha256:abcdef", "/data/hf_models_that_were_converted", "sk-wikipedia-20230101-abcdef",
    "https://example.com/x?max_tokens=5", "{title}: {body}", "0123456789abcdef0123456789abcdef01234567", "host:29500",
    "optimizer.lr=0.003,model.dropout=0", "Bearer of good news", "a-key-to-the-whole-matter", "ssh://git@github.com/x",
    "The bearer of-this-letter-and-others", "--max-new-tokens 1000000", "a//b:c@d", "nvapi-docs", "sk-learn-1.2-Models",
]  # fmt: skip
KEYS = [key for key, _, _ in typed_fields(Run)] + ["hydra.sweep.dir", "+anything", "hydra.job.name", "experiment"]
TEXT_KEYS = text_keys(Run)
# Each key is tested with a share of the secrets or of their forms, another one than its neighbours.
SHARES = [0, *(pytest.param(share, marks=pytest.mark.long) for share in range(1, 6))]
FORMS = ["{}", "'{}'", "[a,'{}']", "[{{path: '{}'}}]", "a,'{}'"]
LAUNCH_KEYS = sorted({key for section in SECTIONS.values() for key, _, _ in typed_fields(section, "launch.")})


def refused(work: Callable[[], Any], where: str) -> None:
    """One line that says where, and not what."""
    with pytest.raises(UserError) as caught:
        work()
    line = str(caught.value)
    assert line.startswith(where), line
    assert "looks like a secret" in line
    assert "canary" not in line.lower()
    assert CANARY not in line
    assert "\n" not in line


@pytest.fixture
def _variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", CANARY)  # whose value a shell puts into what is typed


@pytest.mark.parametrize("value", HARMLESS)
def test_a_value_that_holds_none(value: str) -> None:
    assert not list(secrets_in(value))
    assert masked(value) == value


@pytest.mark.usefixtures("_variable")
@pytest.mark.parametrize("share", SHARES[: len(FORMS)])
@pytest.mark.parametrize("value", SECRETS)
def test_a_value_that_holds_one(value: str, share: int) -> None:
    assert CANARY not in masked(value)
    assert "canary" not in masked(value).lower()
    refused(lambda: checked([value], TEXTS), "")
    for number, key in enumerate(KEYS + LAUNCH_KEYS):
        form = FORMS[(share + number + SECRETS.index(value)) % len(FORMS)].format(value)
        refused(lambda key=key, form=form: checked([f"{key}={form}"], {*TEXTS, *LAUNCH_TEXTS}), key.lstrip("+"))


@pytest.mark.usefixtures("_variable")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("key", TEXT_KEYS)
def test_in_a_file_of_the_users(key: str, share: int) -> None:
    chosen = SECRETS[(share + TEXT_KEYS.index(key)) % len(SHARES) :: len(SHARES)]
    for value in chosen:
        refused(lambda value=value: changed(Run(), {key: value}), key)
    print(f"{key} | {len(chosen)} of {len(chosen)} refused, none repeated")


@pytest.mark.usefixtures("_variable")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_in_every_option_of(script: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(script)
    for number, (verb, action) in enumerate(options_of(script)):
        name, chosen = name_of(action), SECRETS[(share + number) % len(SHARES) :: len(SHARES)]
        for value in chosen:
            ways = [[name, value], [f"{name}={value}"]] if name.startswith("-") else [[value]]
            for way in ways:
                monkeypatch.setattr(sys, "argv", [script, *([verb] if verb else []), *way])
                refused(lambda: parsed(parser), name if name.startswith("-") else "the command line")
        print(f"{script} {verb or ''} {name} | {len(chosen)} of {len(chosen)} refused, none repeated")
    for word in ("--hf-token", f"--wandb_api_key={CANARY}"):
        monkeypatch.setattr(sys, "argv", [script, word, CANARY])
        refused(lambda: parsed(parser), word.partition("=")[0])


def test_a_file_of_the_users_is_checked_before_hydra_writes(tmp_path: Path) -> None:
    """A multirun's configuration goes to multirun.yaml before any run begins. A section of Hydra's is in no run."""
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nhydra:\n  job:\n    env_set:\n      HF_TOKEN: {CANARY}\n"
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(text)
    done = python(
        "train.py", "-m", "--config-dir", str(tmp_path / "configs"), "experiment=mine", "seed=1",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert CANARY not in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs"]
    refused(lambda: check_values({"data": {"train": f"https://u:{CANARY}@h/x"}}), "data.train")
    refused(lambda: check_values({"steps": f"https://h/x?sig={CANARY}"}), "steps")
