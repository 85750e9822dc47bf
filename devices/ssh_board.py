"""A board over ssh: the artifact and the runner go there, JSON lines come back, nothing stays. Torch-free.

The system's own OpenSSH client does the talking, so keys, agents and `~/.ssh/config` work as the user has them; nothing
is asked (`BatchMode`) and an unknown or changed host key is refused (`StrictHostKeyChecking=yes`). The remote command
is a constant: what it does comes over standard input (`board_bootstrap.py`), the user's names among it as JSON, so no
shell there ever reads them. The board needs Python and, for that Python, the runtime.

A connection that drops is made again once and the repeats that are missing are run; if that fails, too, what was heard
is kept and marked. The board cleans up by itself when the connection is gone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from dwindle.devices.bench_options import BenchOptions, Protocol
from dwindle.devices.exported import Exported
from dwindle.devices.host_process import RUNNER, lines_of, parsed, runner_arguments
from dwindle.devices.measurement import Event
from dwindle.errors import RecipeError, TargetError

__all__ = ["Board", "ssh_events"]

_BOOTSTRAP = Path(__file__).with_name("board_bootstrap.py")
_REMOTE_COMMAND = "python3 -u -c 'import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))'"
_CONNECT_SECONDS = 15
_ALIVE = ("ServerAliveInterval=5", "ServerAliveCountMax=3")
_RECONNECTS = 1
_PAUSE_SECONDS = 1.0
_NOT_FOUND = 127
_UNTRANSPORTABLE = ('"', "\n", "${")
"""What OpenSSH would read as something else in the name of a file."""


@dataclass(frozen=True)
class Board:
    """Where a board is: the user and the port are ssh's own choice unless given."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def name(self) -> str:
        """Return it as the user wrote it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


class _DroppedError(Exception):
    """The connection ended before the runner did."""


def ssh_events(
    board: Board, exported: Exported, protocol: Protocol, runtime: str, options: BenchOptions
) -> Iterator[Event]:
    """Yield the runner's events from a board. Raises TargetError with the reason if it cannot be used or is lost."""
    if shutil.which("ssh") is None:
        raise TargetError("no `ssh` on this machine. Install OpenSSH's client (Debian: apt install openssh-client).")
    done, reconnects = 0, _RECONNECTS
    while True:
        left = replace(protocol, repeats=protocol.repeats - done)
        try:
            for event in _session(board, exported, left, runtime, options):
                if event["event"] == "repeat":
                    event = {**event, "index": done}
                    done += 1
                yield event
            return
        except _DroppedError as error:
            lost = f"{board.name}: the connection was lost after {done} of {protocol.repeats} repeats ({error})"
            if not reconnects or done == protocol.repeats:
                raise TargetError(f"{lost}. What was measured before is kept; the board removes its files by itself.") \
                    from error  # fmt: skip
            reconnects -= 1
            yield {"event": "note", "note": f"{lost}; connected again"}
            time.sleep(_PAUSE_SECONDS)


def ssh_command(board: Board, options: BenchOptions) -> list[str]:
    """Return the words of the ssh call."""
    settings = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={_CONNECT_SECONDS}", *_ALIVE]
    words = ["ssh", "-T"]
    if options.identity is not None:
        words += ["-i", _file(options.identity, "identity")]
        settings.append("IdentitiesOnly=yes")
    if options.known_hosts is not None:
        settings += [f'UserKnownHostsFile="{_file(options.known_hosts, "known_hosts")}"', "GlobalKnownHostsFile=none"]
    for setting in settings:
        words += ["-o", setting]
    words += ["-p", str(board.port)] if board.port else []
    words += ["-l", board.user] if board.user else []
    return [*words, "--", board.host, _REMOTE_COMMAND]


def _file(path: Path, what: str) -> str:
    """Return the name of a file as OpenSSH takes it, its own `%` tokens escaped."""
    text = str(Path(path).absolute())
    if any(mark in text for mark in _UNTRANSPORTABLE):
        raise RecipeError(f"{what}={text!r}: ssh cannot take a name with a quote, a line break or '${{'. Rename it.")
    return text.replace("%", "%%")


def _session(
    board: Board, exported: Exported, protocol: Protocol, runtime: str, options: BenchOptions
) -> Iterator[Event]:
    with subprocess.Popen(ssh_command(board, options), stdin=subprocess.PIPE, stdout=subprocess.PIPE,  # noqa: S603
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        said: list[bytes] = []
        listener = threading.Thread(target=_listen, args=(process.stderr, said), daemon=True)
        listener.start()
        request = {"python": options.python, "arguments": runner_arguments(protocol, runtime, exported.vocabulary)}
        threading.Thread(target=_send, args=(process.stdin, exported.folder, request), daemon=True).start()
        state = "connecting"
        try:
            for line in lines_of(cast("IO[bytes]", process.stdout), options.timeout_seconds, board.name):
                event = parsed(line)
                if event is None:
                    continue
                if event["event"] == "received":
                    state = "running"
                    continue
                if event["event"] == "error" and event.get("kind") in ("full", "python"):
                    raise TargetError(_refused(board, str(event["kind"]), str(event["error"])))
                state = "told" if event["event"] in ("end", "error") else "running"
                yield event
        finally:
            if state != "told":
                process.kill()
        process.wait()
        listener.join(timeout=2)
        text = b"".join(said).decode(errors="replace")
        if state == "connecting":
            raise TargetError(_unusable(board, process.returncode, text))
        if state == "running":
            raise _DroppedError(_last_line(text) or f"exit code {process.returncode}")


def _listen(stream: IO[bytes], said: list[bytes]) -> None:
    said.extend(stream)


def _send(stream: IO[bytes], folder: Path, request: dict[str, object]) -> None:
    """Send the bootstrap, the request and the files; leave the stream open, as its end means that we are gone."""
    sources = {"board_runner.py": RUNNER}
    sources |= {f"artifact/{p.relative_to(folder).as_posix()}": p for p in sorted(folder.rglob("*")) if p.is_file()}
    code = _BOOTSTRAP.read_bytes()
    head = {**request, "files": [[name, path.stat().st_size] for name, path in sources.items()]}
    with suppress(OSError, ValueError):  # the other end closed it: what it printed says why
        stream.write(f"{len(code)}\n".encode() + code + json.dumps(head).encode() + b"\n")
        for path in sources.values():
            with path.open("rb") as handle:
                shutil.copyfileobj(handle, stream, 1 << 20)
        stream.flush()


def _refused(board: Board, kind: str, text: str) -> str:
    if kind == "full":
        return f"{board.name}: not enough room on its disk: {text}. Free some space there."
    return f"{board.name}: cannot start the Python that was named there ({text}). Check --python."


def _unusable(board: Board, code: int, text: str) -> str:
    """Return what to tell about a connection that never came to run anything."""
    known = f"[{board.host}]:{board.port}" if board.port else board.host
    if "HOST IDENTIFICATION HAS CHANGED" in text:
        return (f"{board.name}: its host key has CHANGED since it was recorded. Somebody may be listening in, or the "
                f"board was set up anew. If you know that it was: ssh-keygen -R '{known}', then connect once by hand "
                "and compare the fingerprint.")  # fmt: skip
    if "Host key verification failed" in text:
        return (f"{board.name}: its host key is not known here. Connect once by hand with ssh, compare the "
                "fingerprint, and accept it.")  # fmt: skip
    if "Permission denied" in text:
        return (f"{board.name}: no key was accepted. Give the right one with --identity, or install it there with "
                "ssh-copy-id; passwords are never asked for.")  # fmt: skip
    if code == _NOT_FOUND:
        return f"{board.name}: there is no `python3` in its path, the one thing a board needs. Install it there."
    return f"{board.name}: cannot be used: {_last_line(text) or f'ssh ended with exit code {code}'}."


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""
