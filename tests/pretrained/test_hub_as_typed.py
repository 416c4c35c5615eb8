"""`push_to_hub`, and `from_pretrained` of a revision, with a server that answers as the hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command import launch
from hugging_face import random_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "aB3" * 12
PUSH = f"""
import sys
from opt_parallel import OPTForCausalLM
from opt_parallel.runtime.errors import UserError
model = OPTForCausalLM.from_pretrained(sys.argv[1])
for name in ("me/mine", "me/forbidden", "a/b/c"):
    try:
        print(model.push_to_hub(name, private=True, token={TOKEN!r}, commit_message="First"))
    except UserError as error:
        print(error)
"""
LOAD = f"""
import sys
from opt_parallel import OPTForCausalLM
model = OPTForCausalLM.from_pretrained("someone/theirs", revision="v1", cache_dir=sys.argv[1], token={TOKEN!r})
print(model.lm_head.weight.sum().item())
again = OPTForCausalLM.from_pretrained("someone/theirs", revision="v1", cache_dir=sys.argv[1], local_files_only=True)
print(again.name_or_path)
"""


class Hub:
    """A hub with one repository of models, someone/theirs, whose only revision is v1. It keeps what it is sent."""

    def __init__(self, folder: Path) -> None:
        self.files, self.created, self.committed, self.tokens, self.asked = {}, {}, {}, set(), []
        hub = self
        random_model().save_pretrained(folder)
        for path in folder.iterdir():
            self.files[path.name] = path.read_bytes()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                path = self.path.split("?")[0]
                hub.asked.append(path)
                listed = [{"type": "file", "path": name, "size": len(content), "oid": name}
                          for name, content in hub.files.items()]  # fmt: skip
                if path.startswith("/api/models/someone/theirs/tree/"):
                    self._send(json.dumps(listed).encode())
                elif path == "/api/models/someone/theirs/revision/v1":
                    siblings = [{"rfilename": name} for name in hub.files]
                    self._send(json.dumps({"id": "someone/theirs", "sha": COMMIT, "siblings": siblings}).encode())
                elif path.startswith("/someone/theirs/resolve/") and path.rpartition("/")[2] in hub.files:
                    self._send(hub.files[path.rpartition("/")[2]])
                else:
                    self._send(json.dumps({"id": "me/mine", "sha": COMMIT, "siblings": []}).encode())

            do_HEAD = do_GET

            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                content = self.rfile.read(int(self.headers["Content-Length"]))
                address = f"http://{self.headers['Host']}/me/mine"
                if self.path == "/api/repos/create" and b'"forbidden"' in content:
                    self.send_error(400, f"not with {TOKEN}")
                elif self.path == "/api/repos/create":
                    hub.created = json.loads(content)
                    self._send(json.dumps({"url": address}).encode())
                elif self.path.endswith("/preupload/main"):
                    modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                             for file in json.loads(content)["files"]]  # fmt: skip
                    self._send(json.dumps({"files": modes}).encode())
                elif self.path.endswith("/commit/main"):
                    for line in map(json.loads, content.splitlines()):
                        value = line["value"]
                        name = value.get("path", "summary")
                        hub.committed[name] = (
                            base64.b64decode(value["content"]) if "content" in value else value["summary"]
                        )
                    answer = {"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
                    self._send(json.dumps(answer).encode())
                else:
                    self._send(b"{}")

            def _send(self, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def script_in(folder: Path, content: str) -> str:
    (folder / "script.py").write_text(content)
    return str(folder / "script.py")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Hub, dict[str, Any]]]:
    """The hub, and the environment in which its address counts."""
    running = Hub(tmp_path / "theirs")
    address = f"http://127.0.0.1:{running.server.server_port}"
    yield running, {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    running.server.shutdown()


def test_a_model_is_pushed_and_the_token_stays_secret(
    hub: tuple[Hub, dict[str, Any]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server, env = hub
    process = launch(1, script_in(tmp_path_factory.mktemp("script"), PUSH), str(tmp_path / "theirs"), **env)
    assert process.returncode == 0, process.stderr
    pushed, forbidden, misnamed = process.stdout.splitlines()
    assert pushed.endswith("/me/mine")
    assert "push_to_hub: the model could not be uploaded to me/forbidden" in forbidden
    assert "a/b/c is not a repository's name: give OWNER/NAME" in misnamed
    assert (server.created["name"], server.created["visibility"]) == ("mine", "private")
    assert server.committed.pop("summary") == "First"
    assert {"config.json", "generation_config.json", "model.safetensors"} <= server.committed.keys()
    assert f"Bearer {TOKEN}" in server.tokens
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*server.committed.values(), *written])
    assert TOKEN not in process.stdout + process.stderr


def test_a_revision_is_loaded_and_found_again(hub: tuple[Hub, dict[str, Any]], tmp_path: Path) -> None:
    server, env = hub
    process = launch(1, script_in(tmp_path, LOAD), str(tmp_path / "cache"), **env)
    assert process.returncode == 0, process.stderr
    total, name = process.stdout.splitlines()
    assert float(total) == pytest.approx(float(random_model().lm_head.weight.detach().sum()), rel=1e-5)
    assert name == "someone/theirs"
    assert list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    assert f"Bearer {TOKEN}" in server.tokens
    assert any(path.endswith("/v1") for path in server.asked)
    assert not any(path.endswith("/main") for path in server.asked)
