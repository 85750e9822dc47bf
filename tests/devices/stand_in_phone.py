"""A stand-in for an Android phone that says so in its name, for the real adb client and server to talk to.

It speaks adb's transport protocol on a loopback port (CNXN, AUTH, OPEN, OKAY, WRTE, CLSE; the services `shell,v2` and
`sync:`), executes shell commands with this machine's /bin/sh, and keeps pushed files below one folder, which is the
shell's $TMPDIR. `dumpsys`, `getprop` and `df` are small scripts in front of the PATH: what a phone would say is canned,
except for the memory of a process, which is read from /proc. No Android takes part.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path

CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = (
    int.from_bytes(word, "little") for word in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
)
TOKEN, SIGNATURE = 1, 2
VERSION, LARGEST = 0x01000001, 256 * 1024
NAME = "stand-in device (no phone)"
BANNER = (
    "device::ro.product.name=stand_in;ro.product.model=stand-in_device;ro.product.device=stand_in;features=shell_v2,cmd"
)
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  level: 80
  voltage: 4000
  temperature: 312
  Charge counter: 3000000
"""
DUMPSYS = """#!/bin/sh
case "$1" in
  meminfo) awk '/^Pss:/ {print "  TOTAL PSS: " $2}' /proc/"$2"/smaps_rollup;;
  *) cat "$(dirname "$0")/$1.txt" 2>/dev/null;;
esac
"""
GETPROP = f"""#!/bin/sh
case "$1" in ro.product.model) echo "{NAME}";; ro.build.version.release) echo 0;; *) echo stand-in;; esac
"""


class Stream:
    """One service that the client has opened."""

    def __init__(self, phone: StandInPhone, own: int, theirs: int) -> None:
        self.phone, self.own, self.theirs = phone, own, theirs
        self.ready = threading.Event()
        self.arrived = bytearray()
        self.change = threading.Condition()
        self.closed = False

    def write(self, data: bytes) -> None:
        """Send bytes, one packet at a time, each after the last was acknowledged."""
        for start in range(0, len(data), LARGEST):
            self.ready.clear()
            self.phone.send(WRTE, self.own, self.theirs, data[start : start + LARGEST])
            self.ready.wait(20)

    def read(self, count: int) -> bytes:
        """Return exactly so many bytes; raise EOFError when the client has gone."""
        with self.change:
            while len(self.arrived) < count and not self.closed:
                self.change.wait(20)
            if len(self.arrived) < count:
                raise EOFError
            found = bytes(self.arrived[:count])
            del self.arrived[:count]
            return found

    def close(self) -> None:
        self.phone.send(CLSE, self.own, self.theirs)


class StandInPhone:
    """Listens until `stop`; the client reaches it with `adb connect`."""

    def __init__(self, folder: Path, *, authorized: bool = True) -> None:
        self.folder, self.authorized = folder, authorized
        self.files, self.tools = folder / "data", folder / "bin"
        for place in (self.files, self.tools):
            place.mkdir(parents=True)
        for name, text in (("dumpsys", DUMPSYS), ("getprop", GETPROP)):
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)
        self.say("battery", BATTERY)
        self.say("power", "  mWakefulness=Awake\n")
        self.commands: list[str] = []
        self.full = False
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}
        self.running: list[subprocess.Popen[bytes]] = []
        self.connection: socket.socket | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, service: str, text: str) -> None:
        """Set what `dumpsys SERVICE` prints."""
        (self.tools / f"{service}.txt").write_text(text)

    def unplug(self) -> None:
        """Go away, as a cable does: connection and processes end at once."""
        for process in self.running:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, 9)
        with contextlib.suppress(OSError):
            self.listener.close()
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        head = struct.pack("<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self.lock, contextlib.suppress(OSError):
            if self.connection is not None:
                self.connection.sendall(head + data)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connection, _ = self.listener.accept()
                with self.connection, contextlib.suppress(OSError, EOFError):
                    self._serve(self.connection)

    def _serve(self, connection: socket.socket) -> None:
        number = 0
        while True:
            command, first, second, length, _, _ = struct.unpack("<6I", _exactly(connection, 24))
            data = _exactly(connection, length)
            if command in (CNXN, AUTH):
                if self.authorized:
                    self.send(CNXN, VERSION, LARGEST, BANNER.encode())
                elif command == CNXN or first == SIGNATURE:
                    self.send(AUTH, TOKEN, 0, bytes(20))
            elif command == OPEN:
                number += 1
                stream = self.streams[number] = Stream(self, number, first)
                self.send(OKAY, number, first)
                service = data.rstrip(b"\0").decode()
                threading.Thread(target=self._service, args=(stream, service), daemon=True).start()
            elif second in self.streams:
                self._deliver(self.streams[second], command, data)

    def _deliver(self, stream: Stream, command: int, data: bytes) -> None:
        if command == OKAY:
            stream.ready.set()
            return
        with stream.change:
            stream.closed = stream.closed or command == CLSE
            stream.arrived += data
            stream.change.notify_all()
        stream.ready.set()
        if command == WRTE:
            self.send(OKAY, stream.own, stream.theirs)

    def _service(self, stream: Stream, service: str) -> None:
        kind, _, rest = service.partition(":")
        with contextlib.suppress(EOFError, OSError):
            if kind.startswith("shell"):
                self._shell(stream, rest)
            elif kind == "sync":
                self._sync(stream)
        stream.close()

    def _shell(self, stream: Stream, command: str) -> None:
        """Run a command; packets are a byte of kind (1 stdout, 2 stderr, 3 exit), a length and the data."""
        self.commands.append(command)
        environment = {"PATH": f"{self.tools}:/usr/bin:/bin", "TMPDIR": str(self.files), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, cwd=self.files, env=environment,
                                   start_new_session=True)  # fmt: skip
        self.running.append(process)
        assert process.stdout is not None
        with process.stdout as output:
            while part := output.read1(65536):  # type: ignore[attr-defined]
                stream.write(struct.pack("<BI", 1, len(part)) + part)
        stream.write(struct.pack("<BIB", 3, 1, process.wait() & 0xFF))

    def _sync(self, stream: Stream) -> None:
        while True:
            kind, length = stream.read(4), int.from_bytes(stream.read(4), "little")
            if kind == b"QUIT":
                return
            path = stream.read(length).decode()
            if kind == b"STAT":
                place = Path(path)
                mode = place.stat().st_mode if place.exists() else 0
                stream.write(b"STAT" + struct.pack("<3I", mode, 0, 0))
            elif kind == b"SEND":
                self._receive(stream, Path(path.rpartition(",")[0]))

    def _receive(self, stream: Stream, place: Path) -> None:
        assert place.is_relative_to(self.files)
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as handle:
            while True:
                kind, length = stream.read(4), int.from_bytes(stream.read(4), "little")
                if kind == b"DONE":
                    break
                handle.write(stream.read(length))
        if self.full:
            why = b"couldn't write: No space left on device"
            stream.write(b"FAIL" + struct.pack("<I", len(why)) + why)
        else:
            stream.write(b"OKAY" + bytes(4))


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise EOFError
        found += part
    return found
