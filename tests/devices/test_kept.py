from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwindle.devices import (
    BenchOptions,
    Measurement,
    ValidateOptions,
    measure,
    read_artifact,
    read_measurements,
    rejudge,
    run,
    write_measurement,
)
from dwindle.errors import DataError
from dwindle.report import Artifact, Metric, Report, TargetVerdict

from .conftest import write_decoder

QUICK = BenchOptions(prompt_tokens=8, decode_tokens=4, threads=1, repeats=1, warm_up=0)
ASKED = ValidateOptions(("pixel-9",), ("tokens_per_second >= 1",), require="measured", prompt_tokens=8)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = write_decoder(tmp_path / "run" / "export" / "onnx")
    (tmp_path / "run" / "recipe.yaml").touch()
    layers = '{"lm_head": {"bits": 32, "bytes": 352, "parameters": 88, "format": "float32"}}'
    facts = f'"context_length": 32, "vocabulary": 11, "kv_bytes_per_token": 64, "layers": {layers}'
    (folder / "manifest.json").write_text(f'{{"schema": 1, "format": "onnx", {facts}}}')
    return tmp_path / "run"


def exported(run_folder: Path) -> tuple[Artifact, Path]:
    place = run_folder / "export" / "onnx"
    return replace(read_artifact(place), path="export/onnx"), place


def measured(run_folder: Path) -> Measurement:
    pytest.importorskip("onnxruntime")
    return measure(run_folder / "export" / "onnx", options=QUICK, profile="pixel-9")


def speed(verdict: TargetVerdict) -> Metric:
    return next(m for m in verdict.metrics if m.name == "tokens_per_second")


def test_a_measurement_replaces_the_estimate(run_folder: Path) -> None:
    (verdict,), skipped = run(ASKED, [exported(run_folder)], folder=run_folder)
    assert (speed(verdict).basis, speed(verdict).passed, skipped) == ("estimated", False, ())
    found = measured(run_folder)
    place = write_measurement(found, run_folder)
    assert read_measurements(run_folder) == [found]
    (verdict,), skipped = run(ASKED, [exported(run_folder)], folder=run_folder)
    assert (speed(verdict).basis, speed(verdict).passed, skipped) == ("measured", True, ())
    assert speed(verdict).value == found.metrics()["tokens_per_second"].value
    (other,), _ = run(replace(ASKED, targets=("pixel-8",)), [exported(run_folder)], folder=run_folder)
    assert speed(other).basis == "estimated"
    (longer,), _ = run(replace(ASKED, prompt_tokens=9), [exported(run_folder)], folder=run_folder)
    assert speed(longer).basis == "estimated"
    for damaged, told in (("{}", "'schema'"), ('{"schema": 99}', "schema 99, needed 1"), ("[" * 90_000, "recursion")):
        place.write_text(damaged)
        with pytest.raises(DataError, match=f"cannot be read: .*{told}"):
            read_measurements(run_folder)


def test_one_that_cannot_stand_in_is_told(run_folder: Path) -> None:
    found = measured(run_folder)
    partial = replace(found, complete=False, stopped="cable", protocol=replace(found.protocol, repeats=3))
    write_measurement(partial, run_folder)
    (verdict,), (line,) = run(ASKED, [exported(run_folder)], folder=run_folder)
    assert speed(verdict).basis == "estimated"
    assert line.why == "only 1 of 3 repeats: cable"
    write_measurement(found, run_folder)
    (run_folder / "export" / "onnx" / "README.md").write_text("another version")
    _, lines = run(ASKED, [exported(run_folder)], folder=run_folder)
    assert "the artifact has changed since; measure it again" in [line.why for line in lines]


def test_this_machine_is_measured_once(run_folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    options = replace(ASKED, targets=("host",), decode_tokens=4, repeats=1)
    (first,), _ = run(options, [exported(run_folder)], folder=run_folder)
    (kept,) = read_measurements(run_folder)
    (again,), _ = run(options, [exported(run_folder)], folder=run_folder)
    assert speed(first) == speed(again)
    assert speed(first).passed is True
    write_measurement(replace(kept, machine={**kept.machine, "cpu": "another"}), run_folder)
    (fresh,), lines = run(options, [exported(run_folder)], folder=run_folder)
    assert speed(fresh) != speed(first)
    assert [line.why for line in lines] == ["made on another machine"]


def test_verdicts_of_a_run_are_made_anew_only_where_a_measurement_stands(run_folder: Path) -> None:
    options = replace(ASKED, targets=("pixel-9", "pixel-8"))
    verdicts, _ = run(options, [exported(run_folder)], folder=run_folder)
    report = Report(artifacts=(exported(run_folder)[0],), targets=verdicts)
    assert rejudge(report, options, run_folder) == verdicts
    write_measurement(measured(run_folder), run_folder)
    pixel_9, pixel_8 = rejudge(report, options, run_folder)
    assert (speed(pixel_9).basis, speed(pixel_9).passed) == ("measured", True)
    assert (speed(verdicts[0]).basis, speed(verdicts[0]).passed) == ("estimated", False)
    assert pixel_8 == verdicts[1]
    assert rejudge(report, replace(options, prompt_tokens=9), run_folder) == verdicts


def test_a_prompt_that_the_context_cuts_is_the_same_prompt(run_folder: Path) -> None:
    found = measured(run_folder)
    write_measurement(replace(found, protocol=replace(found.protocol, prompt_tokens=16)), run_folder)
    usual = replace(ASKED, prompt_tokens=512)  # cut to 16, half of the context, where it was measured
    (verdict,), skipped = run(usual, [exported(run_folder)], folder=run_folder)
    assert (speed(verdict).basis, skipped) == ("measured", ())
    (verdict,), skipped = run(ASKED, [exported(run_folder)], folder=run_folder)
    assert speed(verdict).basis == "estimated"
    assert [line.why for line in skipped] == ["made after a prompt of 16 tokens; judged are prompts of 8"]
