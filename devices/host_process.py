"""This machine as a target: the runner in a fresh process. Torch-free."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from dwindle.devices.bench_options import Protocol
from dwindle.devices.exported import Exported
from dwindle.devices.measurement import Event
from dwindle.errors import TargetError

__all__ = ["RUNNER", "host_events", "lines_of", "parsed", "runner_arguments"]

RUNNER = Path(__file__).with_name("board_runner.py")
"""The one program that measures, here and elsewhere."""


def runner_arguments(protocol: Protocol, runtime: str, vocabulary: int) -> list[str]:
    """Return the runner's flags; its folder comes first, by whoever knows where that is."""
    flags = {"--runtime": runtime, "--vocabulary": vocabulary, "--prompt-tokens": protocol.prompt_tokens,
             "--decode-tokens": protocol.decode_tokens, "--warm-up": protocol.warm_up, "--repeats": protocol.repeats,
             "--context": protocol.context, "--threads": protocol.threads}  # fmt: skip
    return [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]


def parsed(line: bytes) -> Event | None:
    """Return the event in a line, or None: libraries print what they like between ours."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def lines_of(stream: IO[bytes], timeout_seconds: float, place: str) -> Iterator[bytes]:
    """Yield lines as they come. Raises TargetError when none comes for so long."""
    waiting: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            waiting.put(line)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = waiting.get(timeout=timeout_seconds)
        except queue.Empty as error:
            raise TargetError(f"{place}: nothing was heard for {timeout_seconds:g} s. Lower prompt_tokens, "
                              "decode_tokens or repeats, or raise timeout_seconds.") from error  # fmt: skip
        if line is None:
            return
        yield line


def host_events(exported: Exported, protocol: Protocol, runtime: str, timeout_seconds: float) -> Iterator[Event]:
    """Yield what the runner prints. Raises TargetError if it hangs, or dies without saying why."""
    command = [sys.executable, "-P", str(RUNNER), str(exported.folder)]
    command += runner_arguments(protocol, runtime, exported.vocabulary)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,  # noqa: S603
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        said: list[bytes] = []
        listener = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        listener.start()
        told = False
        try:
            for line in lines_of(cast("IO[bytes]", process.stdout), timeout_seconds, "host"):
                event = parsed(line)
                if event is not None:
                    told = event["event"] in ("end", "error")
                    yield event
        finally:
            if not told:
                process.kill()
        process.wait()
        listener.join(timeout=1)
        if not told:
            why = said[-1].decode(errors="replace").strip() if said else f"exit code {process.returncode}"
            raise TargetError(f"host: the runtime ended without an answer ({why}).")
