"""Every key is explained once, and the pages made of that are current."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import ROOT, python

from opt_parallel.config.reference import PAGES, keys


def test_every_key_is_explained() -> None:
    assert not [key.name for key in keys() if not key.explanation]
    assert {"model.vocab_size", "batch.global", "task.lora.rank", "resume"} <= {key.name for key in keys()}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_current(name: str) -> None:
    assert (ROOT / name).read_text() == PAGES[name](), "make docs"


def test_help_shows_groups_and_keys(tmp_path: Path) -> None:
    process = python("train.py", "--help")
    assert process.returncode == 0, process.stderr
    for part in ("task: classify, finetune, pretrain", "parallel.tensor=1", "tensor-parallel degree"):
        assert part in process.stdout
