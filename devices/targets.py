"""Where an artifact can be measured, and one function that does it. Torch-free.

    host                      this machine, in a fresh process
    ssh://user@board[:port]   a board with Python and OpenSSH               (ssh_board.py)
    adb:SERIAL                an Android phone on a cable or the network    (adb_phone.py)
    apple:NAME | apple:mac    a connected Apple device, or this Mac         (apple_device.py; from a Mac only)
    aihub:DEVICE              a hosted Qualcomm phone                       (hosted_phone.py; the extra `aihub`)

A target is parsed before anything runs. What a user typed goes to other programs as one argument of a list, never
through a shell of this machine, and names that could be read as flags are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dwindle.devices.adb_phone import adb_events
from dwindle.devices.apple_device import apple_events
from dwindle.devices.bench_options import BenchOptions, Protocol
from dwindle.devices.exported import Exported, open_exported
from dwindle.devices.host_process import host_events
from dwindle.devices.hosted_phone import aihub_events
from dwindle.devices.measurement import Event, Gathering, Measurement
from dwindle.devices.ssh_board import Board, ssh_events
from dwindle.errors import RecipeError, TargetError, UnsupportedModel, did_you_mean

__all__ = ["INTERRUPTED", "Target", "measure", "parse_target"]

INTERRUPTED = "interrupted"
"""Why a measurement stopped that the user ended."""

KINDS = ("host", "ssh", "adb", "apple", "aihub")
_SSH = re.compile(r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?"
                  r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*))"
                  r"(?::(?P<port>[0-9]{1,5}))?/?")  # fmt: skip
_SERIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
_NAME = re.compile(r"[A-Za-z0-9][^\x00-\x1f]*")
_HIGHEST_PORT = 65535
_RUNTIMES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnxruntime", "genai"),
    "coreai": ("coreai",),
    "coreml": ("coreml",),
}
"""Format -> what can run it, the usual one first."""


@dataclass(frozen=True)
class Target:
    """A place to measure on, as it was named: `kind` is one of KINDS, `name` what that kind needs."""

    text: str
    kind: str
    name: str = ""
    board: Board | None = None


def parse_target(text: str) -> Target:
    """Return the target that `--on` names. Raises RecipeError with what such a name looks like.

    >>> parse_target("ssh://pi@board.local:2222").board
    Board(host='board.local', user='pi', port=2222)
    """
    kind, _, rest = text.partition(":")
    if text == "host":
        return Target(text, "host")
    if kind not in KINDS or kind == "host":
        near = did_you_mean(kind, KINDS)
        raise RecipeError(f"--on {text!r}: no target{near}. Use host, ssh://user@board[:port], adb:SERIAL, "
                          "apple:NAME, apple:mac or aihub:DEVICE.")  # fmt: skip
    if kind == "ssh":
        return Target(text, kind, board=_board(text, rest))
    pattern = _SERIAL if kind == "adb" else _NAME
    if not pattern.fullmatch(rest):
        raise RecipeError(f"--on {text!r}: {rest!r} is no name of a device (`adb devices` lists serials, for one).")
    return Target(text, kind, rest)


def _board(text: str, rest: str) -> Board:
    match = _SSH.fullmatch(rest.removeprefix("//")) if rest.startswith("//") else None
    port = int(match["port"]) if match and match["port"] else None
    if match is None or (port is not None and not 1 <= port <= _HIGHEST_PORT):
        raise RecipeError(f"--on {text!r}: needed ssh://user@board or ssh://user@board:port, the names made of "
                          "letters, digits, '.', '_' and '-', and not beginning with '-'.")  # fmt: skip
    return Board(match["v6"] or match["host"], match["user"], port)


def measure(
    folder: Path | str,
    on: str = "host",
    options: BenchOptions | None = None,
    *,
    profile: str | None = None,
    heard: Callable[[Event], None] = lambda event: None,
) -> Measurement:
    """Return what an exported folder takes on a target; `heard` is told every event as it comes.

    `profile` names the device profile whose estimates the numbers replace (`host` by itself). What came before a
    target went away is returned, marked; without one whole repeat there is nothing to return and the error is raised.
    Raises RecipeError for names that cannot be meant, UnsupportedModel for a folder or runtime that cannot be run
    there, TargetError for a target that cannot be used, MissingExtra where a library is missing here.
    """
    options = options or BenchOptions()
    target, exported = parse_target(on), open_exported(folder)
    protocol = options.protocol(exported.context_length)
    gathering = Gathering(target.text, protocol)
    stopped: str | None = None
    try:
        for event in _events(target, exported, protocol, _runtime(exported, options, target), options):
            gathering.add(event)
            heard(event)
    except (TargetError, KeyboardInterrupt) as error:
        if not gathering.repeats:
            raise
        stopped = INTERRUPTED if isinstance(error, KeyboardInterrupt) else str(error)
    own = "host" if target.kind == "host" else None
    return gathering.result(on=on, profile=profile or own, artifact=exported.identity(), stopped=stopped)


def _runtime(exported: Exported, options: BenchOptions, target: Target) -> str:
    able = _RUNTIMES[exported.format]
    runtime = options.runtime or able[0]
    if runtime not in able:
        raise RecipeError(
            f"runtime={runtime!r}: {exported.name} is {exported.format}, which {', '.join(able)} can run."
        )
    if runtime == "coreml" and target.kind != "apple":
        raise UnsupportedModel(f"{target.text}: a Core ML package runs on Apple's systems alone. From a Mac: "
                               "--on apple:mac, or --on apple:NAME for a connected device.")  # fmt: skip
    return runtime


def _events(
    target: Target, exported: Exported, protocol: Protocol, runtime: str, options: BenchOptions
) -> Iterator[Event]:
    if target.board is not None:
        return ssh_events(target.board, exported, protocol, runtime, options)
    if target.kind == "adb":
        return adb_events(target.name, exported, protocol, runtime, options)
    if target.kind == "apple":
        return apple_events(target.name, exported, protocol, runtime, options)
    if target.kind == "aihub":
        return aihub_events(target.name, exported, protocol)
    return host_events(exported, protocol, runtime, options.timeout_seconds)
