"""A process with torch, DeepSpeed and Hydra imported, which forks for each command that a test starts.

A new interpreter spends two thirds of the time of a short train.py run on imports. A forked command runs the same file
with the same arguments, environment, working folder and streams, and exits like a separate interpreter.

For each command, the client opens a connection to a Unix socket, and sends a JSON request with the descriptors of
stdout and stderr. The server answers with the process id, and at the end with the exit status and the CPU seconds. If
the client disconnects, the server kills the command.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing.process
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib import import_module, reload
from pathlib import Path
from typing import Any

REQUEST_BYTES = 1 << 20
PRELOADED = (
    "torch", "torch._inductor.compile_fx", "deepspeed", "matplotlib.backends.backend_agg", "matplotlib.figure",
    "opt_parallel.config.compose", "opt_parallel.loop", "opt_parallel.tools.verify", "opt_parallel.tools.evaluate",
    "opt_parallel.launching.sweep", "deepspeed.module_inject.auto_ep_layer", "torch._dynamo.repro.after_dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer", "torch.profiler._cupti_monitor", "omegaconf._impl",
    "pydantic.type_adapter", "antlr4.LL1Analyzer", "transformers.models.opt.modeling_opt",
    "pytest",
)  # fmt: skip


class ForkServer:
    """The client of a fork server, which listens on the Unix socket `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def started(cls, environment: dict[str, str]) -> ForkServer:
        """Start a server, which ends when this process ends."""
        path = str(Path(tempfile.mkdtemp()) / "commands")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        with listener:
            process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())], env=environment, pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(process.kill)
        return cls(path)

    def start(self, arguments: list[str], folder: Path, environment: dict[str, str], out: int, err: int) -> Forked:
        """Run a Python file in a fork. `out` and `err` are the descriptors for its standard output and error."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        request = {"arguments": arguments, "folder": str(folder), "environment": environment}
        socket.send_fds(connection, [json.dumps(request).encode()], [out, err])
        return Forked(connection)


class Forked:
    """A command in a fork of the server. After its end, `status` is the exit status as in `subprocess`.

    `all_seconds` is the number of CPU seconds of all commands that have ended."""

    all_seconds = 0.0

    def __init__(self, connection: socket.socket) -> None:
        self.answers = connection.makefile("rb")
        self.connection, self.status, self.ended = connection, 0, False
        self.pid = int(self.answers.readline())

    def ended_within(self, seconds: float) -> bool:
        if self.ended:
            return True
        if not select.select([self.connection], [], [], seconds)[0]:
            return False
        status, used = self.answers.readline().split()
        self.status = int(status)
        Forked.all_seconds += float(used)
        self.ended = True
        return True

    def kill(self) -> None:
        self.answers.close()
        self.connection.close()


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each request until the client's process ends. The function returns only in a fork, with its request."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> pid, connection
    parent = os.getppid()
    while os.getppid() == parent:
        for key, _ in selector.select(1.0):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                message, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 2)
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    return {**json.loads(message), "descriptors": descriptors}
                for descriptor in descriptors:
                    os.close(descriptor)
                connection.sendall(f"{pid}\n".encode())
                waiting = os.pidfd_open(pid)
                running[waiting] = pid, connection
                selector.register(waiting, selectors.EVENT_READ)
                selector.register(connection, selectors.EVENT_READ, waiting)
            elif key.data is None:  # a command has ended
                assert isinstance(key.fileobj, int)
                pid, connection = running.pop(key.fileobj)
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                _, status, usage = os.wait4(pid, 0)
                if connection.fileno() in selector.get_map():
                    selector.unregister(connection)
                    connection.sendall(
                        f"{os.waitstatus_to_exitcode(status)} {usage.ru_utime + usage.ru_stime}\n".encode()
                    )
                    connection.close()
            else:  # the client has closed the connection
                selector.unregister(key.fileobj)
                os.killpg(running[key.data][0], signal.SIGKILL)
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Prepare this fork for the requested command, with its session, streams, working folder and environment."""
    os.setsid()
    for descriptor, target in zip(request["descriptors"], (1, 2), strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    if any(name.startswith("HF_") for name in request["environment"]):
        reload(import_module("huggingface_hub.constants"))  # which read the environment when they were imported
    os.chdir(request["folder"])
    # Spawned processes look for the command's file in the folder that multiprocessing stored when it was imported.
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    status: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code
    end(status)


def end(status: Any) -> None:
    """Exit as the interpreter does, but without freeing all objects, which takes half a second and copies the server's
    memory."""
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def preload() -> None:
    """Import the libraries that commands need, and do once what is slow only the first time. Nothing may leave a
    thread, because a fork would lose the thread."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from opt_parallel.runtime.log import quiet_libraries

    quiet_libraries()
    for module in PRELOADED:
        import_module(module)
    compose_once()
    train_once()
    draw_once()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads are alive after the imports"
    gc.freeze()


def compose_once() -> None:
    """Find Hydra's plugins, and let its parser build its tables."""
    from hydra import compose, initialize_config_dir
    from hydra.core.plugins import Plugins

    from opt_parallel.config.compose import CONFIGS, register_schema

    Plugins.instance()
    register_schema()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        compose("config", ["model=opt-tiny", "data.train=text.jsonl", "batch.global=4"], return_hydra_config=True)


def train_once() -> None:
    """Compute one step of a tiny network, without DeepSpeed and process groups, which a fork would lose."""
    import torch

    from opt_parallel.config.model import ModelConfig
    from opt_parallel.model.heads import CausalLM
    from opt_parallel.parallel.random import Draw
    from opt_parallel.parallel.shard import fill, random_source
    from opt_parallel.parallel.topology import ALONE

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = CausalLM(ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), ALONE)
    fill(model, random_source(0), torch.device("cpu"), torch.float32)
    ids = torch.arange(8).view(1, 8)
    model(ids, ids, draw=Draw(0, 0, 0, 0, torch.zeros(1, dtype=torch.int64))).backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


def draw_once() -> None:
    """Let matplotlib read its fonts."""
    from opt_parallel.report.plots import draw

    rows = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "curve.png", "title", rows, 1.0)


if __name__ == "__main__":
    preload()
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
