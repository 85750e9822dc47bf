from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dwindle.devices.calibration import Calibration, calibrate, fit
from dwindle.devices.cost_model import estimate
from dwindle.devices.device_profile import WEIGHT_FORMATS, Runtime, load_profile
from dwindle.devices.published import PROFILES, Published, published
from dwindle.devices.quantity import TRUST_SPREAD
from dwindle.devices.workload import LayerLoad, Workload

FILE = Path(__file__).parents[2] / "devices" / "published.yaml"


def row(**changes: object) -> Published:
    values = {"device": "a", "engine": "gpu", "prefill_engine": "gpu", "model": "m", "bandwidth": 100e9, "cores": 1,
              "streamed_bytes": 1e9, "multiply_accumulates": 2e9, "attention_width": 0, "packed": True, "prompt": 512,
              "decode": 10.0, "prefill": None, "compute": None, "source": "a test", "date": "2026-11",
              "trust": "measured", "beyond_facts": False}  # fmt: skip
    return Published(**{**values, **changes})  # type: ignore[arg-type]


def line(share: float, overhead: float, engine: str = "gpu") -> list[Published]:
    """Rows of as many devices, exactly on a line."""
    rows = []
    for number, (size, bandwidth) in enumerate([(1e9, 50e9), (4e9, 50e9), (4e9, 400e9), (2e9, 100e9), (1e9, 800e9)]):
        seconds = size / (share * bandwidth) + overhead
        rows.append(
            row(device=str(number), engine=engine, streamed_bytes=size, bandwidth=bandwidth, decode=1 / seconds)
        )
    return rows


def test_constants_of_exact_data_come_back() -> None:
    found = calibrate(line(0.7, 3e-3)).decode["gpu"]
    assert (found.share, found.overhead_seconds) == pytest.approx((0.7, 3e-3))
    assert calibrate(line(0.7, 3e-3)).errors("decode") == pytest.approx([0] * 5, abs=1e-6)


def test_one_strange_row_does_not_bend_the_rest() -> None:
    rows = line(0.7, 3e-3) + line(0.7, 3e-3)
    rows[0] = replace(rows[0], device="strange", decode=(rows[0].decode or 0) / 4)
    found = calibrate(rows)
    assert found.decode["gpu"].share == pytest.approx(0.7, rel=0.02)
    assert found.worst("decode").device == "strange"
    assert found.worst("decode").error == pytest.approx(3, rel=0.05)


def test_shares_and_overheads_stay_possible() -> None:
    fast = [row(device=str(n), decode=1000 + n) for n in range(3)]
    found = calibrate(fast).decode["gpu"]
    assert found.share == 1
    assert found.overhead_seconds == 0
    falling = [row(device="a", streamed_bytes=1e9, decode=10), row(device="b", streamed_bytes=2e9, decode=11)]
    assert calibrate(falling).decode["gpu"].overhead_seconds >= 0


def test_unpacking_is_found_and_is_for_cpus_alone() -> None:
    """Two CPUs whose memory would allow 100 tokens/s do 10: 0.5 of what they do in prefill."""
    rows = line(0.6, 1e-3, "cpu")
    rows = [replace(r, compute=1e15) for r in rows]
    floor = [row(device=name, engine="cpu", bandwidth=1e12, decode=1 / (2 * 2e9 / (0.5 * c) + 1e-3), compute=c)
             for name, c in (("x", 80e9), ("y", 40e9))]  # fmt: skip
    found = calibrate([*rows, *floor]).decode["cpu"]
    assert found.unpacking == 0.5
    assert (found.share, found.overhead_seconds) == pytest.approx((0.6, 1e-3), rel=1e-3)
    assert calibrate(line(0.7, 1e-3)).decode["gpu"].unpacking is None


def test_a_whole_device_is_left_out() -> None:
    """Rows of one device do not predict each other."""
    twin = [row(device="only", decode=10), row(device="only", streamed_bytes=2e9, decode=5)]
    found = calibrate(twin)
    assert [p.predicted for p in found.predictions] == [None, None]
    assert found.errors("decode") == []
    assert found.median_error("decode") is None


def test_prefill_is_compute_per_core_of_the_other_devices() -> None:
    rows = [row(device="a", prefill=100.0, cores=1), row(device="b", prefill=220.0, cores=2),
            row(device="c", prefill=100.0, cores=4, attention_width=1_000_000)]  # fmt: skip
    found = {p.device: p for p in calibrate(rows).predictions if p.kind == "prefill"}
    per_core = {"a": 4e9 * 100, "b": 4e9 * 110, "c": (4e9 + 2 * 512 * 1e6) * 25}
    assert found["c"].predicted == pytest.approx(4 * (per_core["a"] + per_core["b"]) / 2 / (4e9 + 2 * 512 * 1e6))


def test_the_published_table_is_whole() -> None:
    data = yaml.safe_load(FILE.read_text())
    assert {r["model"] for r in data["rows"]} == set(data["models"])
    assert {r["source"] for r in data["rows"]} == set(data["sources"])
    assert all(
        source["trust"] in TRUST_SPREAD and source["text"] and source["date"] for source in data["sources"].values()
    )
    assert all(entry["what"] and entry["why"] for entry in data["left_out"])
    for r in published():
        assert r.decode
        assert 0.1e9 < r.streamed_bytes < 20e9, r
        bits = 8 * r.streamed_bytes / r.multiply_accumulates
        assert (3.5 < bits < 7) if r.packed else (15 < bits < 17), r


def test_leave_one_out_stays_within_its_goals() -> None:
    """The issue's goals: decode 15 %, prefill 25 %, over every row and over the first table alone."""
    for facts_only in (False, True):
        assert (fit().median_error("decode", facts_only=facts_only) or 1) <= 0.15
        assert (fit().median_error("prefill", facts_only=facts_only) or 1) <= 0.25
    assert len(fit().errors("decode")) > 45
    assert len(fit().errors("prefill")) > 30


def test_profiles_state_the_constants_as_they_are_fitted() -> None:
    constants = fit().decode
    phone = load_profile("iphone-17-pro").compute_units["neural-engine"]
    assert phone.bandwidth_share.at() == pytest.approx(constants["npu"].share, abs=0.005)
    assert phone.overhead.at() == pytest.approx(constants["npu"].overhead_seconds, abs=0.05e-3)
    assert f"{constants['npu'].rows} published rows" in phone.bandwidth_share.source
    mac = load_profile("mac-m4").compute_units["gpu"]
    assert mac.overhead.at() == pytest.approx(constants["apple-gpu"].overhead_seconds, abs=0.05e-3)
    assert mac.bandwidth_share.at("high") == pytest.approx(constants["apple-gpu"].share, abs=0.005)
    assert f"{constants['apple-gpu'].rows} published rows" in mac.overhead.source
    laptop = load_profile("laptop-ddr5").compute_units["cpu"]
    assert laptop.decode_compute is not None
    assert laptop.decode_compute.at() == (constants["cpu"].unpacking or 0) * laptop.effective_compute.at()
    assert f"{constants['cpu'].share:.2f}" in laptop.bandwidth_share.source
    per_core = fit().prefill_compute["apple-gpu-m5"]
    assert load_profile("mac-m5").compute_units["gpu"].effective_compute.at() == pytest.approx(10 * per_core, rel=0.01)


def test_text_and_json_say_the_same() -> None:
    text, data = fit().text(), fit().to_json()
    json.dumps(data, allow_nan=False)
    for kind in ("decode", "prefill"):
        summary = data["leave_one_out"][kind]
        assert f"calibration, {kind}: leave-one-out median error {100 * summary['median_error']:.0f} %" in text
        assert summary["worst"]["device"] in text
        assert len(summary["not_predicted"]) + summary["rows"] == sum(r["kind"] == kind for r in data["rows"])
    assert isinstance(calibrate(), Calibration)


def test_whatever_is_far_off_says_why() -> None:
    """Every row off by more than 40 % has its reason, in text and JSON alike; none has one that is predicted well."""
    text, data = fit().text(), fit().to_json()["leave_one_out"]
    for kind in ("decode", "prefill"):
        outliers = data[kind]["outliers"]
        assert outliers[0] == data[kind]["worst"]
        assert [row for row in outliers if not row["why"]] == []
        for row in outliers:
            assert (
                f"{100 * row['error']:+.0f} %  {row['device']}, {row['model']} ({row['engine']}): {row['why']}" in text
            )
    far = {(p.device, p.model, p.outlier) for p in fit().predictions if abs(p.error or 0) > 0.3}
    explained = {(p.device, p.model, p.outlier) for p in fit().predictions if p.outlier}
    assert explained <= far


def test_the_documents_table_is_what_is_computed() -> None:
    text = (FILE.parents[1] / "docs" / "devices.md").read_text(encoding="utf-8")
    for p in fit().predictions:
        predicted = "-" if p.predicted is None else f"{p.predicted:.4g}"
        error = "-" if p.error is None else f"{100 * p.error:+.0f} %"
        assert f"| {p.device} | {p.model} | {p.engine} | {p.published:.4g} | {predicted} | {error} |" in text
    for kind in ("decode", "prefill"):
        both = (fit().median_error(kind, facts_only=facts_only) or 0 for facts_only in (False, True))
        assert f"| {kind} | {' | '.join(f'{100 * error:.0f} %' for error in both)} |" in text


UNITS = {"apple-gpu": "gpu", "other-gpu": "gpu", "cpu": "cpu"}
UNJUDGED = ("M2 Max CPU",)  # the profile has no CPU unit
UNEXPLAINED = {("Galaxy S24 Ultra", "qwen2.5-1.5b-q4")}


def test_published_decode_rates_lie_in_the_ranges_of_their_profiles() -> None:
    outside, seen = set(), 0
    for r in published():
        if r.device not in PROFILES or r.device in UNJUDGED or not r.decode or r.engine not in (*UNITS, "npu"):
            continue
        profile, seen = load_profile(PROFILES[r.device]), seen + 1
        npu = "neural-engine" if "neural-engine" in profile.compute_units else "npu"
        unit = UNITS.get(r.engine, npu)
        only = replace(profile, runtimes={"any": Runtime(unit, "any", WEIGHT_FORMATS)})
        layer = LayerLoad(
            "all", int(r.multiply_accumulates), int(r.streamed_bytes), True, "int4" if r.packed else "float32"
        )
        found = estimate(only, Workload((layer,), 0, 0, 0, layer.bytes)).metrics["tokens_per_second"]
        if not (found.low or 0) <= r.decode <= (found.high or 0):
            outside.add((r.device, r.model))
    assert seen > 25
    assert outside == UNEXPLAINED
