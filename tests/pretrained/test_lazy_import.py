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
before = [name for name in ("torch", "transformers", "deepspeed", "numpy", "hydra") if name in sys.modules]
names = dir(opt_parallel)
assert sorted(opt_parallel.__all__) == names
opt_parallel.OPTConfig()
from opt_parallel import *
missing = [name for name in names if name not in globals()]
print(json.dumps([before, names, "torch" in sys.modules, opt_parallel.__version__, missing]))
"""
    process = cold_python("-c", script)
    assert process.returncode == 0, process.stderr
    before, names, after, version, missing = json.loads(process.stdout)
    assert before == []
    assert {"OPTConfig", "OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "GenerationConfig"} < set(names)
    assert after
    assert missing == []
    assert version == metadata.version("opt-parallel")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'opt_parallel' has no attribute 'OPTForQuestionAnswering'"):
        _ = opt_parallel.OPTForQuestionAnswering
    with pytest.raises(ImportError):
        exec("from opt_parallel import OPTModle")
