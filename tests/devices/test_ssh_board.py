"""A real sshd on loopback, with a key, a port and a folder of its own, is the board."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from dwindle.devices import BenchOptions, measure, ssh_board
from dwindle.devices.ssh_board import Board, ssh_command
from dwindle.errors import RecipeError, TargetError, UnsupportedModel

from .conftest import write_decoder

pytest.importorskip("onnxruntime")
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
needs_sshd = pytest.mark.skipif(not (Path(SSHD).exists() and shutil.which("ssh")), reason="no sshd on this machine")


def keygen(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@dataclass
class Sshd:
    """The server, and what a client needs to reach it."""

    folder: Path
    port: int = 0
    process: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def on(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("host_key", "user_key"):
            keygen(self.folder / name)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        (self.folder / "tmp").mkdir()
        lines = [f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder}/host_key", "PidFile none",
                 f"AuthorizedKeysFile {self.folder}/authorized_keys", "StrictModes no", "UsePAM no",
                 "PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin yes",
                 f"SetEnv TMPDIR={self.folder}/tmp OMP_NUM_THREADS=1"]  # fmt: skip
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.options = {"identity": self.folder / "user_key", "known_hosts": self.folder / "known_hosts"}
        self.know(self.folder / "host_key")
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen([SSHD, "-f", str(self.folder / "sshd_config"), "-D", "-e"], stderr=log)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def know(self, key: Path) -> None:
        kind, code, *_ = key.with_suffix(".pub").read_text().split()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {code}\n")

    def drop(self, *, server_too: bool = False) -> None:
        """Kill every open connection, and nothing else unless told."""
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        if server_too:
            self.process.kill()
            self.process.wait()
        for child in children:
            if child.name().startswith("sshd"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    def left(self) -> list[str]:
        """What lies in the board's folder for temporary files, once what runs there had time to end."""
        for _ in range(100):
            found = sorted(p.name for p in (self.folder / "tmp").iterdir())
            if not found:
                break
            time.sleep(0.05)
        return found


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    folder = tmp_path / "sshd"
    folder.mkdir()
    server = Sshd(folder)
    server.start()
    yield server
    server.drop(server_too=True)


def quick(sshd: Sshd, **changes: Any) -> BenchOptions:
    given = {"prompt_tokens": 8, "decode_tokens": 4, "repeats": 2, "threads": 1, "timeout_seconds": 60,
             "python": sys.executable}  # fmt: skip
    return BenchOptions(**{**given, **sshd.options, **changes})


@needs_sshd
def test_measured_end_to_end_and_nothing_is_left(tmp_path: Path, sshd: Sshd) -> None:
    folder = write_decoder(tmp_path / "a model; touch x")
    found = measure(folder, sshd.on, quick(sshd), profile="raspberry-pi-5")
    assert found.complete
    assert (found.on, found.profile, len(found.repeats)) == (sshd.on, "raspberry-pi-5", 2)
    assert found.runtime.startswith("onnxruntime")
    assert {"tokens_per_second", "time_to_first_token_seconds", "peak_memory_bytes", "load_seconds"} <= set(
        found.metrics()
    )
    here = measure(folder, options=quick(sshd))
    assert found.repeats[0].tokens == here.repeats[0].tokens
    assert sshd.left() == []


@needs_sshd
def test_a_dropped_connection_is_made_again_once(tmp_path: Path, sshd: Sshd) -> None:
    folder = write_decoder(tmp_path / "onnx", context=2048)
    dropped = []

    def drop_after_the_first(event: Any) -> None:
        if event["event"] == "repeat" and not dropped:
            dropped.append(event["index"])
            sshd.drop()

    found = measure(folder, sshd.on, quick(sshd, decode_tokens=500, repeats=6), heard=drop_after_the_first)
    assert dropped == [0]
    assert found.complete
    assert len(found.repeats) == 6
    assert "connection was lost after" in found.notes[0]
    assert sshd.left() == []


@needs_sshd
def test_a_lost_board_leaves_what_was_heard(tmp_path: Path, sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_decoder(tmp_path / "onnx", context=2048)
    monkeypatch.setattr(ssh_board, "_PAUSE_SECONDS", 0.1)

    def end_all(event: Any) -> None:
        if event["event"] == "repeat":
            sshd.drop(server_too=True)

    found = measure(folder, sshd.on, quick(sshd, decode_tokens=500, repeats=6), heard=end_all)
    assert not found.complete
    assert 1 <= len(found.repeats) < 6
    assert "cannot be used" in (found.stopped or "")
    assert found.metrics()["tokens_per_second"].basis == "measured"
    assert sshd.left() == []


@needs_sshd
def test_host_keys_are_checked(tmp_path: Path, sshd: Sshd) -> None:
    folder = write_decoder(tmp_path / "onnx")
    sshd.know(keygen(tmp_path / "another"))
    with pytest.raises(TargetError, match=r"has CHANGED .* ssh-keygen -R '\[127\.0\.0\.1\]"):
        measure(folder, sshd.on, quick(sshd))
    (sshd.folder / "known_hosts").write_text("")
    with pytest.raises(TargetError, match="not known here"):
        measure(folder, sshd.on, quick(sshd))


@needs_sshd
def test_what_a_board_may_lack(tmp_path: Path, sshd: Sshd) -> None:
    folder = write_decoder(tmp_path / "onnx")
    with pytest.raises(TargetError, match="no key was accepted"):
        measure(folder, sshd.on, quick(sshd, identity=keygen(tmp_path / "wrong")))
    with pytest.raises(TargetError, match="cannot start the Python"):
        measure(folder, sshd.on, quick(sshd, python=f"python3; touch {tmp_path}/x"))
    bare = sshd.folder / "bare python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(TargetError, match=r"no numpy\. Install it there"):
        measure(folder, sshd.on, quick(sshd, python=str(bare)))
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UnsupportedModel, match="the runtime there cannot run it"):
        measure(folder, sshd.on, quick(sshd))
    assert not (tmp_path / "x").exists()
    assert sshd.left() == []


def test_nobody_listens(tmp_path: Path) -> None:
    if not shutil.which("ssh"):
        pytest.skip("no ssh on this machine")
    with pytest.raises(TargetError, match="cannot be used"):
        measure(write_decoder(tmp_path / "onnx"), "ssh://nobody@127.0.0.1:1", BenchOptions())


def test_without_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_board.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="openssh-client"):
        measure(write_decoder(tmp_path / "onnx"), "ssh://board")


def test_words_of_the_call(tmp_path: Path) -> None:
    key = tmp_path / "100% mine; touch x"
    key.touch()
    words = ssh_command(Board("board", "pi", 2222), BenchOptions(identity=key))
    assert words[words.index("-i") + 1].endswith("100%% mine; touch x")
    assert words[-5:-1] == ["-l", "pi", "--", "board"]
    assert "StrictHostKeyChecking=yes" in words
    quoted = tmp_path / 'a"b'
    quoted.touch()
    with pytest.raises(RecipeError, match="cannot take a name with a quote"):
        ssh_command(Board("board"), BenchOptions(known_hosts=quoted))
