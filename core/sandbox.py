"""Run Python code that nobody has read, in a subprocess that can do little. Torch-free.

    time       wall clock (`seconds`; then the whole group is killed) and the same CPU time per process
    memory     `memory_bytes` of address space
    files      written nowhere but in a scratch folder that is removed: 64 MiB in all, 16 MiB each; 64 open at a time
    processes  none besides the program (threads are allowed); no signals to others
    network    none: no socket can be made
    output     1 MiB each of stdout and stderr; a program that writes more is ended
    start      `python -I`: empty environment, no user site, current folder not importable; stdin is what it is given

On Linux these are resource limits, fresh namespaces (user, mount, network, process, IPC), Landlock and a seccomp filter
(`sandbox_launcher`), without privileges. Where the system lacks or forbids one, the others hold what they can, and
`SandboxResult.missing` names what does not hold: without namespaces, Landlock still keeps files and the filter
network and processes. Docker's default profile forbids namespaces, and old kernels (before 5.13) lack Landlock.

On macOS: resource limits but for memory (the kernel does not enforce RLIMIT_AS), no processes, and `sandbox-exec`
against network and writing. That branch was not executed by the project. Elsewhere there is no sandbox: an error.

What is not hidden: the program may read whatever the user who runs dwindle may read. It cannot send it anywhere but
into its own output. This stops careless code and common malice, not an attack on the kernel: for that use a virtual
machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dwindle.errors import DwindleError

__all__ = ["SandboxResult", "SandboxUnavailable", "run_python"]

_LOG = logging.getLogger("dwindle")
_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_POSIX = os.name == "posix"
_OUTPUT_BYTES = 1 << 20
_FILE_BYTES = 16 << 20
_SCRATCH_BYTES = 64 << 20
_OPEN_FILES = 64
_SEATBELT = '(version 1)(allow default)(deny network*)(deny file-write*)(allow file-write* (subpath "{}"))'


class SandboxUnavailable(DwindleError):
    """This system has no way to confine a process."""


@dataclass(frozen=True)
class SandboxResult:
    """What a program did."""

    exit_code: int
    """The program's own; 128 + n if signal n ended it."""
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool = False
    """It wrote more than 1 MiB to stdout or stderr and was ended."""
    missing: tuple[str, ...] = ()
    """Limits that this system did not give, with the reason."""


def run_python(
    code: str, *, stdin: str = "", seconds: float = 5.0, memory_bytes: int = 512 << 20
) -> SandboxResult:  # fmt: skip
    """Return what `code` does as a program of its own within the limits above.

    Raises SandboxUnavailable where processes cannot be confined (Windows).
    """
    if not _POSIX:
        raise SandboxUnavailable(f"running unread code needs Linux or macOS; this is {sys.platform}. Use a checker "
                                 "that runs none (exact, contains, arithmetic, json).")  # fmt: skip
    forbidden = _forbidden_namespaces()
    with tempfile.TemporaryDirectory(prefix="dwindle-sandbox-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        (folder / "scratch").mkdir()
        (folder / "program.py").write_text(code, encoding="utf-8", errors="surrogatepass")
        command = [sys.executable, "-I", "-X", "utf8", str(folder / "program.py")]
        limits = {
            "RLIMIT_CPU": int(seconds) + 1, "RLIMIT_AS": memory_bytes, "RLIMIT_FSIZE": _FILE_BYTES,
            "RLIMIT_NOFILE": _OPEN_FILES, "RLIMIT_CORE": 0,
        }  # fmt: skip
        result = _launched(folder, command, limits, stdin, seconds, forbidden)
    if result.missing:
        _say_once(result.missing)
    return result


def _launched(
    folder: Path, command: list[str], limits: dict[str, int], stdin: str, seconds: float, forbidden: str | None
) -> SandboxResult:
    read, write = os.pipe()
    try:
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode("utf-8", "surrogatepass"))
            given.seek(0)
            settings = {
                "namespaces": forbidden is None, "scratch": str(folder / "scratch"), "scratch_bytes": _SCRATCH_BYTES,
                "limits": limits, "status": write, "command": command,
                "missing": [forbidden] if forbidden and sys.platform == "linux" else [],
            }  # fmt: skip
            process = subprocess.Popen(  # noqa: S603  (our own launcher, by full path)
                [*_seatbelt(folder), sys.executable, "-I", "-S", str(_LAUNCHER), json.dumps(settings)],
                stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd=folder,
                start_new_session=True, pass_fds=[write],
            )  # fmt: skip
        os.close(write)
        write = -1
        outputs, timed_out, truncated = _collected(process, time.monotonic() + seconds)
        with open(read, "rb", closefd=False) as status:
            told = status.read()
    finally:
        for descriptor in (read, write):
            if descriptor >= 0:
                os.close(descriptor)
    out, err = (text.decode("utf-8", "replace") for text in outputs)
    if not told and not timed_out:
        said = (err.strip().splitlines() or ["no message"])[-1]
        raise SandboxUnavailable(f"the sandbox could not be set up ({said}).")
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    missing = tuple(json.loads(told)) if told else ()
    return SandboxResult(code, out, err.replace(f"{folder}/", ""), timed_out, truncated, missing)


def _collected(process: subprocess.Popen[bytes], deadline: float) -> tuple[tuple[bytes, bytes], bool, bool]:
    """Return (stdout, stderr), whether the time ran out, whether there was too much; the process group is gone."""
    assert process.stdout is not None
    assert process.stderr is not None
    found = (bytearray(), bytearray())
    timed_out = truncated = False
    with selectors.DefaultSelector() as selector:
        for index, stream in enumerate((process.stdout, process.stderr)):
            selector.register(stream, selectors.EVENT_READ, index)
        try:
            while selector.get_map() and not (timed_out or truncated):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                timed_out = not ready and time.monotonic() >= deadline
                for key, _ in ready:
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        selector.unregister(key.fileobj)
                    found[key.data].extend(piece)
                    truncated = truncated or len(found[key.data]) > _OUTPUT_BYTES
            if not (timed_out or truncated):
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    timed_out = True
        finally:
            _kill_group(process)
    out, err = (bytes(text[:_OUTPUT_BYTES]) for text in found)
    return (out, err), timed_out, truncated


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and all it started: its namespace dies with it, a filtered program has no children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _seatbelt(folder: Path) -> list[str]:
    """Return the macOS command that keeps network and writing away, where it exists."""
    tool = Path("/usr/bin/sandbox-exec")
    return [str(tool), "-p", _SEATBELT.format(folder / "scratch")] if sys.platform == "darwin" and tool.exists() else []


@functools.cache
def _forbidden_namespaces() -> str | None:
    """Return why fresh namespaces cannot be had, or None; found out once, by trying."""
    if sys.platform != "linux":
        return f"namespaces (none on {sys.platform})"
    with tempfile.TemporaryDirectory(prefix="dwindle-sandbox-") as name:
        folder = Path(name).resolve()
        (folder / "scratch").mkdir()
        try:
            _launched(folder, [sys.executable, "-I", "-S", "-c", ""], {}, "", 30.0, None)
        except SandboxUnavailable as error:
            return f"namespaces ({error})"
    return None


@functools.cache
def _say_once(missing: tuple[str, ...]) -> None:
    _LOG.warning("sandbox: this system does not give %s", "; ".join(missing))
