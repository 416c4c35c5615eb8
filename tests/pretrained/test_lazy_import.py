"""`import opt_parallel` is cheap, and names what it has."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from command import cold_python

import opt_parallel

ROOT = Path(__file__).parents[2]


def test_torch_comes_with_the_first_class() -> None:
    script = """
import json, sys
import opt_parallel
names = dir(opt_parallel)
libraries = ("torch", "transformers", "deepspeed", "numpy", "hydra")
print(json.dumps([[name for name in libraries if name in sys.modules], names, opt_parallel.__version__]))
"""
    process = cold_python("-c", script)
    assert process.returncode == 0, process.stderr
    before, names, version = json.loads(process.stdout)
    assert before == []
    assert names == sorted(opt_parallel.__all__)
    assert {"OPTConfig", "OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "GenerationConfig"} < set(names)
    assert version == metadata.version("opt-parallel")


def test_a_star_imports_every_name() -> None:
    found: dict[str, object] = {}
    exec("from opt_parallel import *", found)
    assert found.keys() - {"__builtins__"} == set(opt_parallel.__all__)
    assert found["OPTConfig"] is opt_parallel.OPTConfig


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'opt_parallel' has no attribute 'OPTForQuestionAnswering'"):
        _ = opt_parallel.OPTForQuestionAnswering
    with pytest.raises(ImportError):
        exec("from opt_parallel import OPTModle")
