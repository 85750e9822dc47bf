"""What a board executes over one ssh connection: take the files, run the runner, leave nothing behind.

Sent over standard input and executed there by `python3 -c`, so nothing is installed and the remote command line is one
constant. Python 3.10, standard library alone. Standard input brings one JSON line and then the files' bytes:

    {"files": [[name, bytes], ...], "python": "python3", "arguments": [...]}

Standard output brings the runner's own lines. Standard input stays open until the runner is done; when it ends early
the connection is gone, and the runner is killed. The folder, `dwindle-bench-PID-*` in /var/tmp (or wherever temporary
files go), is removed in any case ($TMPDIR comes first); one
that a board without power left behind is removed by the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

__all__ = ["main"]

_PREFIX = "dwindle-bench-"
_CHUNK = 1 << 20
_SPARE = 16 << 20
"""Bytes that stay free on the disk."""


def _say(event: str, **values: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def _base() -> Path:
    """Return a folder on a disk: /tmp is memory on many boards."""
    for place in (os.environ.get("TMPDIR", ""), "/var/tmp", tempfile.gettempdir(), os.path.expanduser("~")):  # noqa: S108
        if os.path.isdir(place) and os.access(place, os.W_OK):
            return Path(place)
    return Path(tempfile.gettempdir())


def _remove_left_over(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        pid = folder.name[len(_PREFIX) :].partition("-")[0]
        if pid.isdigit() and folder.owner() == Path.home().owner():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue


def _receive(folder: Path, files: list[Any]) -> bool:
    """Write what comes; return whether all of it came."""
    for name, size in files:
        place = folder / name
        if (place.is_absolute() and folder not in place.parents) or ".." in Path(name).parts:
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as handle:
            left = size
            while left:
                part = sys.stdin.buffer.read(min(_CHUNK, left))
                if not part:
                    return False
                handle.write(part)
                left -= len(part)
    return True


def _run(folder: Path, request: dict[str, Any]) -> int:
    python = os.path.expanduser(request["python"])
    command = [python, "-u", str(folder / "board_runner.py"), str(folder / "artifact"), *request["arguments"]]
    try:
        # ONNX Runtime leaves a `.ses` in the folder for temporary files: let that be ours, which goes.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True,  # noqa: S603
                                 env={**os.environ, "TMPDIR": str(folder)})  # fmt: skip
    except OSError as error:
        _say("error", kind="python", error=f"{python}: {error.strerror}")
        return 1

    def stop(*_: Any) -> None:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        stop()

    for name in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, stop)
    threading.Thread(target=watch, daemon=True).start()
    try:
        return child.wait()
    finally:
        stop()


def main() -> int:
    """Serve one request."""
    request = json.loads(sys.stdin.buffer.readline())
    base = _base()
    with contextlib.suppress(OSError, KeyError):
        _remove_left_over(base)
    needed, free = sum(size for _, size in request["files"]), shutil.disk_usage(base).free
    if needed + _SPARE > free:
        _say("error", kind="full", error=f"{needed:,} bytes are needed in {base}, {free:,} are free")
        return 1
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    try:
        if not _receive(folder, request["files"]):
            return 1
        _say("received", bytes=needed)
        return _run(folder, request)
    except OSError as error:
        _say("error", kind="full", error=f"{folder}: {error.strerror}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    code = 1
    with contextlib.suppress(BrokenPipeError):
        code = main()
    os._exit(code)
