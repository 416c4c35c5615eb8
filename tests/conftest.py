from __future__ import annotations

import gc
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import matrix
import pytest
import torch
from command import SHARED_SERVER, fork_server
from crew import Crew
from fork_server import Forked

# What a developer's shell or a batch system may have set, and what would change what commands do and print.
FOREIGN = re.compile(
    r"(HF|ONEDNN|DNNL|ATEN|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|WANDB|TORCH|TORCHELASTIC|NCCL|GLOO|DS|OMP|MKL|SLURM|OMPI|PMIX?|HYDRA|MPL"
    r"|MASTER|LC)_.*|PYTHON(DONTWRITEBYTECODE|IOENCODING|UTF8|OPTIMIZE|WARNINGS|UNBUFFERED|FAULTHANDLER)|MPLBACKEND|LANG|LANGUAGE"
    r"|(HTTP|HTTPS|ALL|NO|FTP)_PROXY|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|COLUMNS|LINES|NO_COLOR|FORCE_COLOR",
    re.IGNORECASE,
)
for name in [name for name in os.environ if FOREIGN.fullmatch(name)]:
    del os.environ[name]
os.environ |= {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",  # sums in another order would differ in the last digits
    "CUDA_VISIBLE_DEVICES": "",  # the crew is of CPUs; tests marked gpu start their own processes
}
torch.set_num_threads(1)
gc.disable()  # until the tests are collected: all that is imported stays, and looking for garbage in it takes seconds
sys.dont_write_bytecode = False  # compiling the tests' modules again takes each worker ten seconds
# A job in the background of a shell, or under nohup, ignores these, and so would every command that a test starts.
for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)


# CPU seconds of a test that is not marked long, all its processes together, on a machine that is idle otherwise. A
# ceiling against runaways. Where the host is busy, the same test has taken seven times the CPU seconds, so `_slowness`
# divides them. A run of long tests has no ceiling: --all-pairs gives a test more to do.
BUDGET = 15.0
PLAIN_LOOP = 0.2  # CPU seconds of the loop in `_slowness` on an idle machine


# The files that take longest start first, so that the workers of `make test` end at about the same time.
SLOWEST = {
    "test_resume", "test_engine", "test_export", "test_import", "test_lora", "test_path_table", "test_checkpoint",
    "test_damage", "test_train", "test_evaluate", "test_foreign_text", "test_secrets", "test_failing_disks",
    "test_fake_cuda", "test_commands", "test_classify", "test_verify", "test_forward",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-pairs", action="store_true", help="resume from every layout in every layout, not a choice")
    parser.addoption("--matrix", action="store_true", help="write docs/matrix.md: which features ran together")
    parser.addoption("--long", action="store_true", help="also what takes half a minute and more, marked long")


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        os.environ[SHARED_SERVER] = fork_server().path  # which the workers inherit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in SLOWEST)
    chosen = [item for item in items if config.getoption("--long") or item.get_closest_marker("long") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = _cpu_seconds()
    yield
    seconds = _cpu_seconds() - before
    if seconds > BUDGET and not item.config.getoption("--long") and (seconds := seconds / _slowness()) > BUDGET:
        pytest.fail(f"took {seconds:.0f} s of CPU time, over {BUDGET:.0f}: make it smaller or mark it long")


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + Forked.all_seconds + Crew.all_seconds


def _slowness() -> float:
    """How many times the CPU seconds of an idle machine a plain loop takes now; at least 1."""
    before = time.process_time()
    for _ in range(10_000_000):
        pass
    return max(1.0, (time.process_time() - before) / PLAIN_LOOP)


@pytest.fixture(scope="session", autouse=True)
def _matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    if request.config.getoption("--matrix"):
        matrix.record_checkpoints(tmp_path_factory.getbasetemp())


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A worker sends what it ran to the session that started it, which writes the page."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ran"] = [sorted(names) for names in matrix.ran]
    elif session.config.getoption("--matrix") and exitstatus == 0:
        matrix.PAGE.write_text(matrix.page(), encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    matrix.ran.update(map(frozenset, getattr(node, "workeroutput", {}).get("ran", [])))


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Crew]]:
    """`crew(size)`: worker processes of that number, started at first use."""
    crews: dict[int, Crew] = {}
    folder = tmp_path_factory.mktemp("crews")

    def of_size(size: int) -> Crew:
        if size not in crews:
            crews[size] = Crew(size, folder)
        return crews[size]

    yield of_size
    for each in crews.values():
        each.dismiss()
