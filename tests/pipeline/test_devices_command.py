from __future__ import annotations

import json
from pathlib import Path

import pytest

from dwindle.devices.device_profile import list_profiles, profile_files
from dwindle.pipeline.cli import main


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    return tmp_path / "configuration"


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ("devices", *words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, captured.err


def test_list_names_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["devices"]] == list(list_profiles())


def test_show_gives_each_number_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "show", "iphone-17-pro")
    assert code == 0
    assert "memory.entitled" in out
    assert "7.8 GB  [derived, 2026-11] No observation on 12 GB" in out
    assert "on neural-engine, from iOS 18 on float16" in out
    data = json.loads(invoke(capsys, "show", "iphone-17-pro", "--json")[1])
    assert data["runtimes"]["coreml"]["formats_by_os"]["iOS 18"][0] == "float16"


def test_show_tells_what_others_published(capsys: pytest.CaptureFixture[str]) -> None:
    out = invoke(capsys, "show", "raspberry-pi-5")[1]
    assert "published  tinyllama-q4 on Raspberry Pi 5 (cpu): 10 tokens/s  [secondary, 2026-11] specpicks" in out
    rows = json.loads(invoke(capsys, "show", "galaxy-s25-ultra", "--json")[1])["published"]
    assert {row["model"]: row["decode"] for row in rows}["lfm2.5-1.2b-q4"] == 70
    assert json.loads(invoke(capsys, "show", "pixel-9", "--json")[1])["published"] == []


def test_published_devices_are_profiles_known_here() -> None:
    from dwindle.devices.published import PROFILES, published

    assert set(PROFILES) <= {row.device for row in published()}
    assert set(PROFILES.values()) <= set(list_profiles())


def test_check_of_everything_reports_the_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "check")
    count = len(profile_files())
    assert code == 0
    assert f"{count} of {count} profiles sound" in out
    assert "calibration, decode: leave-one-out median error" in out
    assert "calibration, prefill: leave-one-out median error" in out
    assert "+329 %  Galaxy S24 Ultra, qwen2.5-1.5b-q4 (cpu): the paper's runtime is five times slower" in out
    data = json.loads(invoke(capsys, "check", "--json")[1])
    assert data["problems"] == {}
    assert data["calibration"]["leave_one_out"]["decode"]["median_error"] <= 0.15
    assert data["calibration"]["leave_one_out"]["prefill"]["median_error"] <= 0.25


def test_a_faulty_profile_of_the_user_is_found(capsys: pytest.CaptureFixture[str], own_configuration: Path) -> None:
    place = own_configuration / "dwindle" / "devices" / "mine.yaml"
    place.parent.mkdir(parents=True)
    place.write_text(profile_files()["pixel-9"].read_text().replace("unit: GB/s", "unit: GB", 1))
    code, out, _ = invoke(capsys, "check")
    assert code == 2
    assert f"{place}: bandwidth.unit: 'GB' is no unit of bandwidth" in out
    code, out, _ = invoke(capsys, "check", place)
    assert code == 2
    assert "calibration" not in out


def test_a_checked_copy_is_added(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(profile_files()["pixel-9"].read_text().replace("name: pixel-9", "name: my-phone"))
    assert invoke(capsys, "check", mine)[0] == 0
    assert invoke(capsys, "add", mine)[0] == 0
    assert invoke(capsys, "show", "my-phone")[0] == 0
    code, _, err = invoke(capsys, "show", "my-fone")
    assert code == 2
    assert "did you mean 'my-phone'" in err


def test_every_fault_of_a_profile_is_named_and_nothing_is_added(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine; touch x.yaml"
    text = profile_files()["pixel-9"].read_text().replace("name: pixel-9", "name: my-phone")
    mine.write_text(
        text.replace("unit: GB/s, ", "", 1).replace("unit: GB/s\n", "\n", 1).replace("source:", "sauce:", 1)
    )
    code, _, err = invoke(capsys, "add", mine)
    assert code == 2
    assert "bandwidth.unit: missing" in err
    assert ".source: missing" in err
    assert "sauce: unknown key (did you mean 'source'?)" in err
    assert invoke(capsys, "show", "my-phone")[0] == 2
    assert not list(tmp_path.rglob("x"))
