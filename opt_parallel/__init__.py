"""Train OPT language models, 125M to 175B parameters, with tensor parallelism and ZeRO.

The classes that Hugging Face documents are imported when they are first named, because torch takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_parallel.parallel.topology import Topology
    from opt_parallel.pretrained.classes import OPTForCausalLM, OPTForSequenceClassification, OPTModel
    from opt_parallel.pretrained.config import OPTConfig
    from opt_parallel.pretrained.generation import GenerationConfig

__version__ = "0.1.0"
__all__ = [
    "GenerationConfig",
    "OPTConfig",
    "OPTForCausalLM",
    "OPTForSequenceClassification",
    "OPTModel",
    "Topology",
    "__version__",
]

_HOMES = {
    "GenerationConfig": "pretrained.generation",
    "OPTConfig": "pretrained.config",
    "OPTForCausalLM": "pretrained.classes",
    "OPTForSequenceClassification": "pretrained.classes",
    "OPTModel": "pretrained.classes",
    "Topology": "parallel.topology",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'opt_parallel' has no attribute {name!r}")
    return getattr(import_module(f"opt_parallel.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
