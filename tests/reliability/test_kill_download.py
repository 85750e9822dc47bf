"""SIGKILL in the middle of a download, from a local stand-in of the hub: the next start fetches the rest, and is whole."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c" * 40
CODE = """
from dwindle.model_source import find_folder
folder, revision = find_folder("someone/tiny")
print(folder, revision)
"""


class Hub(ThreadingHTTPServer):
    """Serves one model as the hub does; `stuck` holds the weights back half-way."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.stuck = True
        self.half = threading.Event()
        """Set once half of the weights were sent."""
        self.released = threading.Event()
        self.asked: list[tuple[str, str]] = []


class Answers(BaseHTTPRequestHandler):
    """HEAD and GET of what `snapshot_download` asks for."""

    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answer with one."""
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.path.startswith("/api/models/someone/tiny"):
            files = [{"rfilename": p.name} for p in sorted(self.server.folder.iterdir())]
            data = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": files}).encode()
        elif (self.server.folder / name).is_file():
            data = (self.server.folder / name).read_bytes()
        else:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0) if body else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        if name.endswith(".safetensors") and self.server.stuck:
            self.wfile.write(data[start : len(data) // 2])
            self.wfile.flush()
            self.server.half.set()
            self.server.released.wait(120)
            return
        self.wfile.write(data[start:])


@pytest.fixture
def hub(tiny_bundle: Callable[..., Any], tmp_path: Path) -> Iterator[Hub]:
    tiny_bundle().save(tmp_path / "model")
    server = Hub(tmp_path / "model")
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    serving.join()


def test_a_download_that_was_killed_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                   "NO_PROXY": "127.0.0.1"}  # fmt: skip
    words = [sys.executable, "-P", "-c", CODE]
    first = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    reached = hub.half.wait(120)
    first.kill()
    told = first.communicate()
    assert reached, told
    hub.stuck = False
    hub.released.set()
    offline = subprocess.run(
        words, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert "Error" in offline.stderr or not (Path(offline.stdout.split()[0]) / "model.safetensors").exists(), (
        "half a model was taken for a whole one"
    )
    second = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-2000:]
    folder, revision = second.stdout.split()
    assert revision == COMMIT
    for file in (tmp_path / "model").iterdir():
        fetched = Path(folder) / file.name
        if fetched.exists() or file.suffix == ".safetensors":
            assert fetched.read_bytes() == file.read_bytes(), f"{file.name}: other bytes than on the hub"
    assert not list((tmp_path / "home").rglob("*.incomplete")), "something was left over"
