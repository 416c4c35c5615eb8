"""Secrets come from the environment alone, and end up nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import python, small
from omegaconf import OmegaConf

from opt_parallel.compose import TEXTS, run_from, to_dict
from opt_parallel.config import Run
from opt_parallel.errors import UserError
from opt_parallel.overrides import checked
from opt_parallel.secrets import looks_secret

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
    assert "set it in the environment" in str(caught.value)
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


def test_what_the_environment_holds_is_written_nowhere(tmp_path: Path) -> None:
    secrets = {"WANDB_API_KEY": CANARY, "HF_TOKEN": "hf_canaryCanaryCanary", "DB_PASSWORD": "a canary's password"}
    arguments = [*small(tmp_path), "steps=2", "logging.wandb=offline", "logging.tensorboard=true"]
    process = python("train.py", "-m", *arguments, f"hydra.sweep.dir={tmp_path / 'run'}", "seed=1", **secrets)
    assert process.returncode == 0, process.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "multirun.yaml", "metrics.jsonl", "rank-00000.log", "manifest.json"} <= names
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in secrets.items():
            assert secret.encode() not in content, f"{path} holds {name}"
    for secret in secrets.values():
        assert secret not in process.stdout + process.stderr
