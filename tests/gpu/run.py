"""Run every check that needs a GPU, in less than four minutes: `make test-gpu`.

Each part runs in processes of its own and reports alone, so the failure of a part hides no other part. The exit status
is 1 if a part failed, and 0 otherwise. With `--device cpu`, the same parts run on a CPU, as far as they can.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
CHECKS = "tests/gpu/checks.py"
# Seconds on a GPU for the parts that run side by side, and for both parts that measure time. A CPU gets more.
FIRST, STAGES, SPEED = 100.0, 80.0, 40.0
ON_CPU = 10


@dataclass
class Part:
    """A command of which the output is collected in a file."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, help="install these wheels in a temporary folder first, without network")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        site = Path(temporary) / "site"
        if arguments.wheels is not None and not installed(arguments.wheels, site):
            return 1
        paths = [str(ROOT), str(ROOT / "tests" / "support"), str(site), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        os.environ["TMPDIR"] = temporary
        return max(run(arguments.device, Path(temporary) / "cpu.json"))


def installed(wheels: Path, site: Path) -> bool:
    """Whether pip installed all wheels of a folder in the folder `site`."""
    found = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not found:
        print(f"error: --wheels {wheels} has no wheel: docs/gpu.md says how to fill the folder", file=sys.stderr)
        return False
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *found]
    return subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode == 0


def run(device: str, expected: Path) -> list[int]:
    """The exit status of each part. The file `expected` passes the losses on the CPU to the part that compares them."""
    print(f"device: {device}; python: {sys.executable}", flush=True)
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    first = [
        start("machine", CHECKS, "machine", "--device", device),
        start("losses on the CPU", CHECKS, "expected", "--device", "cpu", "--output", str(expected), **on_cpu),
        start("NCCL on one rank", CHECKS, "collectives", "--device", device),
        start("peak memory, measured and traced", CHECKS, "memory", "--device", device),
    ]
    if device == "cuda":
        first.append(start("tests marked gpu", "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--long", *files))
    slower = ON_CPU if device == "cpu" else 1
    deadline = time.monotonic() + FIRST * slower
    statuses = {part.name: finished(part, deadline) for part in first}
    # These measure seconds a step, so each runs alone.
    stages = start("ZeRO stages", CHECKS, "losses", "--device", device, "--expected", str(expected))
    statuses[stages.name] = finished(stages, time.monotonic() + STAGES * slower)
    speed = start("speed", CHECKS, "speed", "--device", device)
    statuses[speed.name] = finished(speed, time.monotonic() + SPEED * slower)
    print()
    for name, status in statuses.items():
        print(f"{'passed' if status == 0 else 'FAILED'}  {name}")
    return [int(status != 0) for status in statuses.values()]


def start(name: str, *words: str, **variables: str) -> Part:
    output = tempfile.TemporaryFile()  # noqa: SIM115  closed when the part is forgotten
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env={**os.environ, **variables}, start_new_session=True,
    )  # fmt: skip
    return Part(name, process, output, time.monotonic())


def finished(part: Part, deadline: float) -> int:
    """Wait for a part and print its output. Returns: its exit status, or 124 if it had to be killed."""
    try:
        status = part.process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()
        status = 124
    part.output.seek(0)
    seconds = time.monotonic() - part.started
    print(f"\n== {part.name}: status {status}, {seconds:.0f} s{' (killed: too slow)' * (status == 124)}")
    print(part.output.read().decode(errors="replace").rstrip(), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
