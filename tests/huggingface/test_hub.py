"""A hub id: config, tokenizer and one format of weights are fetched, from a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command import launch
from hugging_face import random_model

from opt_parallel.huggingface.hub import weights_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys, torch
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.runtime.errors import reporting
from opt_parallel.parallel.topology import ALONE
with reporting():
    print(open_checkpoint(sys.argv[1]).model(ALONE, torch.device("cpu")).decoder.embed_tokens.weight.sum().item())
"""


def script_in(folder: Path) -> str:
    (folder / "script.py").write_text(SCRIPT)
    return str(folder / "script.py")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a hub whose only repository is someone/theirs, and that repository's folder."""
    folder = tmp_path / "repository"
    folder.mkdir()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/models/someone/theirs/tree/"):
                files = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
                    for path in sorted(folder.iterdir())
                ]
                self._send(json.dumps(files).encode())
                return
            if self.path.split("?")[0] in ("/api/models/someone/theirs", "/api/models/someone/theirs/revision/main"):
                siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                self._send(json.dumps({"id": "someone/theirs", "sha": COMMIT, "siblings": siblings}).encode())
                return
            file = folder / self.path.rpartition("/")[2]
            if self.path.startswith("/someone/theirs/resolve/") and file.is_file():
                self._send(file.read_bytes())
                return
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def _send(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def test_one_format_is_fetched_and_found_again(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = hub
    model = random_model()
    model.save_pretrained(folder, max_shard_size="50KB")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "merges.txt"):
        (folder / name).write_bytes(b"x" * 1000)
    env = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    process = launch(1, script_in(tmp_path), "someone/theirs", **env)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) == pytest.approx(float(model.lm_head.weight.detach().sum()), rel=1e-5)
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    wanted = {path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt")}
    assert fetched == wanted
    shutil.rmtree(folder)
    again = launch(1, script_in(tmp_path), "someone/theirs", **env, HF_HUB_OFFLINE="1")
    assert again.stdout == process.stdout, again.stderr


def test_what_the_hub_does_not_have_is_one_line(hub: tuple[str, Path], tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub[0], "HF_HUB_CACHE": str(tmp_path / "cache")}
    process = launch(1, script_in(tmp_path), "someone/else", **env)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "error: --checkpoint someone/else is not a local folder and could not be downloaded" in process.stderr


def test_the_best_format_is_chosen() -> None:
    everything = [
        "config.json", "flax_model.msgpack", "tf_model.h5.index.json", "tf_model-00001-of-00002.h5",
        "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "model.safetensors",
    ]  # fmt: skip
    assert weights_of(everything) == ["model.safetensors"]
    assert weights_of(everything[:-1]) == ["pytorch_model-*.bin"]
    assert weights_of(everything[:4]) == ["tf_model-*.h5"]
    assert weights_of(everything[:2]) == ["flax_model.msgpack"]
    assert weights_of(everything[:1]) == []
