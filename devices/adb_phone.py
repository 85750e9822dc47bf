"""An Android phone through the adb client: push, run, read what the system says of memory and heat. Torch-free.

Two things can run there, in /data/local/tmp (the shell user's $TMPDIR):

    --runner FILE    a program for the phone. It is called as `FILE ARTEFACT --runtime ... --prompt-tokens 512 ...` with
                     the flags of `board_runner.py` and prints that file's JSON lines; ONNX Runtime's C API in some
                     150 lines of C++ is enough.
    --python NAME    a Python there that has onnxruntime, for the shell user (a rooted phone, a custom image, Android
                     on a board). A stock phone has none; Termux has one for its own user, to be measured by ssh:
                     `pkg install openssh python-onnxruntime; sshd`, `adb forward tcp:8022 tcp:8022`, and then
                     `--on ssh://127.0.0.1:8022`.

Peak memory is the runner's own count where it gives one, else the largest `TOTAL PSS` that `dumpsys meminfo PID` told
once a second. Temperature is the battery's. Energy is the battery's charge counter times its voltage, and only while
the phone is on battery alone (adb over the network): a cable charges.

A locked or sleeping phone is refused: Android runs background processes on small cores. Every word that goes to the
phone's shell is quoted.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from dwindle.devices.bench_options import BenchOptions, Protocol
from dwindle.devices.exported import Exported
from dwindle.devices.host_process import RUNNER, lines_of, parsed, runner_arguments
from dwindle.devices.measurement import Event
from dwindle.errors import TargetError, did_you_mean
from dwindle.storage import folder_bytes

__all__ = ["adb_events"]

_SECONDS = 30.0
_PUSH_SECONDS = 3600.0
_POLL_SECONDS = 1.0
_SPARE_BYTES = 64 << 20
_PREFIX = "dwindle-bench"
_LOCKED = re.compile(
    r"(?:mShowingLockscreen|isKeyguardShowing|mKeyguardShowing|KeyguardShowing|mDreamingLockscreen)=true"
)
_ASLEEP = re.compile(r"mWakefulness=(Asleep|Dozing)")
_PSS = re.compile(r"TOTAL PSS:\s*([\d,]+)|^\s*TOTAL\s+([\d,]+)", re.MULTILINE)


def adb_events(
    serial: str, exported: Exported, protocol: Protocol, runtime: str, options: BenchOptions
) -> Iterator[Event]:
    """Yield the runner's events from a phone. Raises TargetError with the reason if it cannot be used or goes away."""
    phone = _Phone(serial)
    phone.require_ready(folder_bytes(exported.folder) + _SPARE_BYTES)
    base = f"{phone.folder_for_files()}/{_PREFIX}"
    try:
        phone.shell(f"rm -rf {shlex.quote(base)} && mkdir -p {shlex.quote(base)}")
        program = phone.send(exported, base, options)
        words = [*program, "artifact", *runner_arguments(protocol, runtime, exported.vocabulary)]
        yield from phone.run(base, words, options.timeout_seconds)
    finally:
        with suppress(TargetError):
            phone.shell(f"rm -rf {shlex.quote(base)}")


@dataclass
class _Phone:
    """One device of the adb server."""

    serial: str
    peak: int | None = None
    battery: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"adb:{self.serial}"

    # -- before anything is sent -----------------------------------------------------------------------------------

    def require_ready(self, needed_bytes: int) -> None:
        """Raise TargetError unless the phone answers, is awake and unlocked, and has room."""
        if shutil.which("adb") is None:
            raise TargetError("no `adb` on this machine. Install Android's platform tools (Debian: apt install adb).")
        listed = dict(re.findall(r"^(\S+)[ \t]+(device|unauthorized|offline|recovery|sideload|no permissions)",
                                 self._adb(["devices"], alone=True), re.MULTILINE))  # fmt: skip
        state = listed.get(self.serial)
        if state is None:
            known = did_you_mean(self.serial, listed) if listed else " (none is connected)"
            raise TargetError(f"{self.name}: no such device{known}. See `adb devices`; over the network: adb connect.")
        if state == "unauthorized":
            raise TargetError(f"{self.name}: has not allowed this computer. Unlock it and accept its question.")
        if state != "device":
            raise TargetError(f"{self.name}: is {state}. Reconnect it, or restart adb (adb kill-server).")
        if _ASLEEP.search(self.shell("dumpsys power")) or _LOCKED.search(
            self.shell("dumpsys window policy; dumpsys activity activities")
        ):
            raise TargetError(f"{self.name}: is locked or its screen is off, which slows it down. Unlock it and keep "
                              "the screen on (adb shell svc power stayon true).")  # fmt: skip
        free = self._free_bytes()
        if free is not None and free < needed_bytes:
            raise TargetError(
                f"{self.name}: its storage is full: {needed_bytes:,} bytes are needed, {free:,} are free."
            )

    def folder_for_files(self) -> str:
        """Return where the shell user may write."""
        return self.shell('printf %s "${TMPDIR:-/data/local/tmp}"').strip().rstrip("/")

    def _free_bytes(self) -> int | None:
        lines = self.shell(f"df -k {shlex.quote(self.folder_for_files())}").splitlines()
        numbers = [word for word in (lines[-1].split() if len(lines) > 1 else []) if word.isdigit()]
        return 1024 * int(numbers[2]) if len(numbers) > 2 else None

    # -- sending and running ---------------------------------------------------------------------------------------

    def send(self, exported: Exported, base: str, options: BenchOptions) -> list[str]:
        """Push artifact and runner; return the words that start it there."""
        if options.runner is None:
            found = self._adb(["shell", f"command -v {shlex.quote(options.python)} || echo none"]).strip()
            if found.endswith("none"):
                raise TargetError(
                    f"{self.name}: the shell there has no {options.python}. A stock phone has no Python: give a "
                    "program with --runner FILE, or run Termux's Python by ssh (docs/devices.md says how for both)."
                )
        self._push(exported.folder, f"{base}/artifact")
        if options.runner is None:
            self._push(RUNNER, f"{base}/board_runner.py")
            return [options.python, "-u", "board_runner.py"]
        self._push(Path(options.runner).resolve(), f"{base}/runner")
        self.shell(f"chmod 755 {shlex.quote(f'{base}/runner')}")
        return ["./runner"]

    def _push(self, source: Path, place: str) -> None:
        self._adb(["push", str(source), place], seconds=_PUSH_SECONDS)

    def run(self, base: str, words: list[str], silence_seconds: float) -> Iterator[Event]:
        """Yield the program's events, each repeat with what the system says of memory, heat and charge."""
        inside = (
            f'cd {shlex.quote(base)} && printf \'{{"event": "pid", "pid": %s}}\\n\' $$ && TMPDIR={shlex.quote(base)} '
        )
        command = ["adb", "-s", self.serial, "shell", f"{inside} exec {shlex.join(words)}"]
        self.battery = self._battery()
        over, told = threading.Event(), False
        watch = None
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,  # noqa: S603
                              stderr=subprocess.STDOUT) as process:  # fmt: skip
            said = b""
            try:
                for line in lines_of(cast("IO[bytes]", process.stdout), silence_seconds, self.name):
                    event = parsed(line)
                    if event is None:
                        said = line if line.strip() else said
                    elif event["event"] == "pid":
                        watch = threading.Thread(target=self._watch, args=(int(event["pid"]), over), daemon=True)
                        watch.start()
                    else:
                        told = event["event"] in ("end", "error")
                        yield self._enriched(event)
            finally:
                over.set()
                if not told:
                    process.kill()
                if watch is not None:
                    watch.join(timeout=_SECONDS)
            process.wait()
        if not told:
            why = said.decode(errors="replace").strip() or f"adb ended with exit code {process.returncode}"
            raise TargetError(
                f"{self.name}: the runner there ended, or the phone went away, before it was done ({why})."
            )
        yield {"event": "note", "note": self._power_note()}

    def _enriched(self, event: Event) -> Event:
        if event["event"] == "start":
            return {**event, "machine": {**event.get("machine", {}), **self._facts()}}
        if event["event"] != "repeat":
            return event
        before, self.battery = self.battery, self._battery()
        added: dict[str, Any] = {
            "temperature_c": _degrees(self.battery),
            "energy_joules": _joules(before, self.battery),
        }
        if event.get("peak_memory_bytes") is None:
            added["peak_memory_bytes"] = self.peak
        return {**event, **added}

    def _facts(self) -> dict[str, Any]:
        names = {"model": "ro.product.model", "system": "ro.build.version.release", "cpu": "ro.soc.model"}
        found = {key: self.shell(f"getprop {name}").strip() for key, name in names.items()}
        found["system"] = f"Android {found['system']}"
        return {**found, "temperature_c": _degrees(self.battery)}

    def _watch(self, pid: int, over: threading.Event) -> None:
        """Remember the largest memory of a process until told that it is over."""
        while not over.wait(_POLL_SECONDS):
            with suppress(TargetError):
                match = _PSS.search(self.shell(f"dumpsys meminfo {pid}"))
                if match:
                    now = 1024 * int((match[1] or match[2]).replace(",", ""))
                    self.peak = max(self.peak or 0, now)

    def _battery(self) -> dict[str, str]:
        with suppress(TargetError):
            text = self.shell("dumpsys battery")
            return {
                key.strip().lower(): value.strip() for key, _, value in (s.partition(":") for s in text.splitlines())
            }
        return {}

    def _power_note(self) -> str:
        with suppress(TargetError):
            match = re.search(r"Thermal Status: (\d)", self.shell("dumpsys thermalservice"))
            hot = f"; thermal status {match[1]} of 6" if match else ""
            power = "on external power, so no energy" if _powered(self.battery) else "on battery"
            return f"battery at {self.battery.get('level', '?')} %, {power}{hot}; temperatures are the battery's"
        return "battery not known"

    # -- the client ------------------------------------------------------------------------------------------------

    def shell(self, command: str) -> str:
        """Return what a command of the phone's shell prints."""
        return self._adb(["shell", command])

    def _adb(self, words: list[str], *, alone: bool = False, seconds: float = _SECONDS) -> str:
        command = ["adb", *([] if alone else ["-s", self.serial]), *words]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds, check=False,  # noqa: S603
                                  stdin=subprocess.DEVNULL)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{self.name}: `adb {words[0]}` was not done after {seconds:g} s.") from error
        output = done.stdout.decode(errors="replace")
        told = (done.stderr.decode(errors="replace") + output).strip()
        if "No space left on device" in told:
            raise TargetError(f"{self.name}: its storage is full: {told.splitlines()[-1]}")
        if done.returncode and words[0] == "shell" and "dumpsys" in words[1]:
            return output
        if done.returncode:
            raise TargetError(f"{self.name}: `adb {words[0]}` failed: {told or f'exit code {done.returncode}'}")
        return output


def _degrees(battery: dict[str, str]) -> float | None:
    """Return the battery's temperature, which Android gives in tenths of a degree.

    >>> _degrees({"temperature": "312"}), _degrees({})
    (31.2, None)
    """
    text = battery.get("temperature", "")
    return int(text) / 10 if text.isdigit() else None


def _powered(battery: dict[str, str]) -> bool:
    return any(key.endswith("powered") and value == "true" for key, value in battery.items())


def _joules(before: dict[str, str], after: dict[str, str]) -> float | None:
    """Return joules drawn between two looks at a battery on no cable, or None: microampere-hours x millivolts.

    >>> _joules({"charge counter": "3000000", "voltage": "4000"}, {"charge counter": "2999000", "voltage": "4000"})
    14.4
    """
    counters = [look.get("charge counter", "") for look in (before, after)]
    volts = after.get("voltage", "")
    if _powered(before) or _powered(after) or not all(c.isdigit() for c in counters) or not volts.isdigit():
        return None
    drawn = int(counters[0]) - int(counters[1])
    return round(drawn * int(volts) * 3600 / 1e9, 6) if drawn > 0 else None
