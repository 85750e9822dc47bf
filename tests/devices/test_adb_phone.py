"""The real adb client and server against a stand-in device; see stand_in_phone.py. No phone took part."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dwindle.devices import BenchOptions, adb_phone, measure
from dwindle.errors import TargetError

from .conftest import write_decoder
from .stand_in_phone import BATTERY, NAME, StandInPhone

pytest.importorskip("onnxruntime")
needs_adb = pytest.mark.skipif(shutil.which("adb") is None, reason="no adb on this machine")


def adb(*words: str) -> str:
    return subprocess.run(["adb", *words], capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An adb server of the test's own, on a port and with keys of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    adb("start-server")
    yield
    adb("kill-server")


@pytest.fixture
def phone(tmp_path: Path, server: None) -> Iterator[StandInPhone]:
    made = StandInPhone(tmp_path / "stand-in device")
    assert "connected" in adb("connect", made.serial)
    yield made
    made.unplug()


def quick(**changes: Any) -> BenchOptions:
    given = {"prompt_tokens": 8, "decode_tokens": 4, "repeats": 2, "threads": 1, "timeout_seconds": 60,
             "python": sys.executable}  # fmt: skip
    return BenchOptions(**{**given, **changes})


@needs_adb
def test_measured_end_to_end_and_nothing_is_left(tmp_path: Path, phone: StandInPhone) -> None:
    folder = write_decoder(tmp_path / "a model; touch x")
    found = measure(folder, f"adb:{phone.serial}", quick(), profile="pixel-9")
    assert found.complete
    assert found.machine["model"] == NAME
    assert found.repeats[0].tokens == measure(folder, options=quick()).repeats[0].tokens
    assert found.repeats[0].temperature_c == 31.2
    assert found.repeats[0].energy_joules is None
    assert "on external power, so no energy" in found.notes[0]
    assert list(phone.files.iterdir()) == []
    assert not list(tmp_path.rglob("x"))


@needs_adb
def test_a_program_of_the_users_own(tmp_path: Path, phone: StandInPhone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is what the system says of the process, and its energy the battery's counter times its voltage."""
    monkeypatch.setattr(adb_phone, "_POLL_SECONDS", 0.1)
    repeat = '{"event": "repeat", "index": %d, "first_token_seconds": 0.5, "token_seconds": [0.25, 0.25]}'
    counter = phone.tools / "battery.txt"
    unplugged = BATTERY.replace("USB powered: true", "USB powered: false")
    phone.say("battery", unplugged)
    lines = "\n".join(
        f"sleep 0.6; sed -i 's/Charge counter: .*/Charge counter: {3000000 - 1000 * n}/' '{counter}'; "
        f"echo '{repeat % (n - 1)}'; sleep 0.4" for n in (1, 2)
    )  # fmt: skip
    program = tmp_path / "my runner; touch x"
    start = '{"event": "start", "runtime": "mine", "machine": {}}'
    program.write_text(
        f'#!/bin/sh\ntest -f "$1/model.onnx" || exit 3\necho \'{start}\'\n{lines}\necho \'{{"event": "end"}}\'\n'
    )
    found = measure(write_decoder(tmp_path / "onnx"), f"adb:{phone.serial}", quick(runner=program))
    assert found.complete
    assert found.runtime == "mine"
    assert found.metrics()["tokens_per_second"].value == 4.0
    assert (found.metrics()["peak_memory_bytes"].value or 0) > 10_000
    assert found.metrics()["joules_per_token"].value == pytest.approx(7.2)
    assert "on battery" in found.notes[0]


@needs_adb
def test_a_phone_that_goes_away(tmp_path: Path, phone: StandInPhone) -> None:
    folder = write_decoder(tmp_path / "onnx", context=2048)

    def unplug(event: Any) -> None:
        if event["event"] == "repeat":
            phone.unplug()

    found = measure(folder, f"adb:{phone.serial}", quick(decode_tokens=500, repeats=6), heard=unplug)
    assert not found.complete
    assert 1 <= len(found.repeats) < 6
    assert "went away" in (found.stopped or "")


@needs_adb
def test_what_a_phone_may_lack(tmp_path: Path, phone: StandInPhone) -> None:
    folder, on = write_decoder(tmp_path / "onnx"), f"adb:{phone.serial}"
    with pytest.raises(TargetError, match=r"has no python4; touch x\. A stock phone has no Python"):
        measure(folder, on, quick(python="python4; touch x"))
    phone.full = True
    with pytest.raises(TargetError, match="storage is full"):
        measure(folder, on, quick())
    df = phone.tools / "df"
    df.write_text("#!/bin/sh\necho Filesystem 1K-blocks Used Available Use% Mounted\necho /dev/x 100 90 10 90% /data\n")
    df.chmod(0o755)
    with pytest.raises(TargetError, match="10,240 are free"):
        measure(folder, on, quick())
    phone.say("activity", "  mKeyguardShowing=true\n")
    with pytest.raises(TargetError, match="is locked or its screen is off"):
        measure(folder, on, quick())
    phone.say("activity", "")
    phone.say("power", "  mWakefulness=Asleep\n")
    with pytest.raises(TargetError, match="is locked or its screen is off"):
        measure(folder, on, quick())
    assert not list(tmp_path.rglob("x"))


@needs_adb
def test_devices_that_cannot_be_used(tmp_path: Path, server: None) -> None:
    folder = write_decoder(tmp_path / "onnx")
    with pytest.raises(TargetError, match=r"no such device \(none is connected\)"):
        measure(folder, "adb:R5CT1234567", quick())
    shy = StandInPhone(tmp_path / "stand-in device", authorized=False)
    adb("connect", shy.serial)
    with pytest.raises(TargetError, match="has not allowed this computer"):
        measure(folder, f"adb:{shy.serial}", quick())
    with pytest.raises(TargetError, match=r"no such device \(did you mean '127\.0\.0\.1"):
        measure(folder, f"adb:{shy.serial}0", quick())
    shy.unplug()


def test_without_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb_phone.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="apt install adb"):
        measure(write_decoder(tmp_path / "onnx"), "adb:R5CT1234567")
