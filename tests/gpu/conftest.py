from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import cold_python
from filelock import FileLock


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What `traced.py` prints. It runs once for all workers of the test session."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # the parent folder belongs to the session, and this one to a worker
        folder = folder.parent
    path = folder / "traced.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            file = str(Path(__file__).with_name("traced.py"))
            process = cold_python("tests/support/call.py", file, "print_results")
            assert process.returncode == 0, process.stderr
            path.write_text(process.stdout.splitlines()[-1])
    return json.loads(path.read_text())
