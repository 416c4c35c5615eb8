"""Calls a function of a test file in a process of its own: `call.py FILE FUNCTION ARGUMENTS…`."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location

if __name__ == "__main__":
    spec = spec_from_file_location("module", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["module"] = module_from_spec(spec)  # data classes look up their module by its name
    spec.loader.exec_module(module)
    getattr(module, sys.argv[2])(*sys.argv[3:])
