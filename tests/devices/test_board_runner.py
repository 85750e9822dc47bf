from __future__ import annotations

import json
from pathlib import Path

import pytest

from dwindle.devices import board_runner

from .conftest import write_decoder

FLAGS = ["--prompt-tokens", "4", "--decode-tokens", "2", "--repeats", "1", "--threads", "1", "--vocabulary", "11",
         "--context", "32"]  # fmt: skip


def test_one_event_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert board_runner.main([str(write_decoder(tmp_path / "onnx")), *FLAGS]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["start", "loaded", "repeat", "end"]
    assert len(events[2]["tokens"]) == 3
    assert len(events[2]["token_seconds"]) == 2
    assert events[0]["machine"]["memory_bytes"] > 0


def test_a_fault_is_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert board_runner.main([str(tmp_path / "none"), *FLAGS]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["kind"]) == ("error", "refused")


def test_a_cache_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_runner, "_free_bytes", lambda: 0)
    monkeypatch.setattr(board_runner.OnnxDecoder, "reset", lambda self: self._empty(1000))
    assert board_runner.main([str(write_decoder(tmp_path / "onnx")), *FLAGS]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["kind"] == "memory"
    assert "ask for a smaller context" in last["error"]


def test_energy_only_where_a_meter_is(tmp_path: Path) -> None:
    assert board_runner.energy_joules(tmp_path) is None
    battery = tmp_path / "power_supply" / "BAT0"
    battery.mkdir(parents=True)
    for name, value in (("status", "Charging"), ("charge_now", "1000000"), ("voltage_now", "4000000")):
        (battery / name).write_text(value + "\n")
    assert board_runner.energy_joules(tmp_path) is None
    (battery / "status").write_text("Discharging\n")
    assert board_runner.energy_joules(tmp_path) == pytest.approx(-14400)  # 1 Ah at 4 V is 4 Wh
    (battery / "energy_now").write_text("1000000\n")
    assert board_runner.energy_joules(tmp_path) == pytest.approx(-3600)
    package = tmp_path / "powercap" / "intel-rapl:0"
    package.mkdir(parents=True)
    (package / "energy_uj").write_text("2500000\n")
    assert board_runner.energy_joules(tmp_path) == pytest.approx(2.5)
