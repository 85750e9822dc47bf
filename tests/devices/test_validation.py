from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dwindle.devices import ValidateOptions, junit, kept, run
from dwindle.devices.cost_model import METRIC_UNITS
from dwindle.devices.published import PROFILES, published
from dwindle.errors import RecipeError
from dwindle.report import Artifact, Measurement, Metric, Parity, Report, Skipped, StepRecord, TargetVerdict

from .conftest import write_decoder


def metric(verdict: TargetVerdict, name: str) -> Metric:
    return next(m for m in verdict.metrics if m.name == name)


def test_budgets_pass_and_fail(artifact: Artifact) -> None:
    options = ValidateOptions(("pixel-9",), {"tokens_per_second": 30, "memory": "1MB"})
    (verdict,), skipped = run(options, [(artifact, Path())])
    assert metric(verdict, "tokens_per_second").passed is True
    assert metric(verdict, "tokens_per_second").budget == ">= 30 tokens/s"
    assert metric(verdict, "peak_memory_bytes").passed is False
    assert verdict.passed is False
    assert (verdict.artifact, verdict.variant) == ("export/onnx", "onnx")
    assert not skipped


def test_memory_of_the_device_is_always_a_budget(toaster: Path, artifact: Artifact) -> None:
    (verdict,), _ = run(ValidateOptions((str(toaster),)), [(artifact, Path())])
    assert metric(verdict, "peak_memory_bytes").budget == "<= 500 MB (what an app may use)"
    assert verdict.passed is True
    (looser,), _ = run(ValidateOptions((str(toaster),), {"memory": "600MB"}), [(artifact, Path())])
    assert "500 MB" in (metric(looser, "peak_memory_bytes").budget or "")
    assert metric(verdict, "peak_memory_bytes").passed


def test_a_limit_the_device_does_not_have(toaster: Path, artifact: Artifact) -> None:
    with pytest.raises(RecipeError, match="knows no such limit"):
        run(ValidateOptions((str(toaster),), memory="entitled"), [(artifact, Path())])


def test_each_artifact_a_device_can_run_is_judged(artifact: Artifact) -> None:
    coreml = replace(
        artifact,
        format="coreml",
        path="export/coreml",
        variant="apple",
        details={"layers": {"a": {"bits": 4, "bytes": 100, "parameters": 200, "format": "palette4"}}},
    )
    both = [(artifact, Path()), (coreml, Path())]
    verdicts, skipped = run(ValidateOptions(("iphone-15-pro", "pixel-9")), both)
    assert [(v.profile, v.artifact) for v in verdicts] == [
        ("iphone-15-pro", "export/onnx"), ("iphone-15-pro", "export/coreml"), ("pixel-9", "export/onnx")]  # fmt: skip
    assert [s.what for s in skipped] == ["coreml (apple) on pixel-9"]


def test_nothing_to_run_fails_the_budgets(artifact: Artifact) -> None:
    coreml = replace(artifact, format="coreml")
    (verdict,), skipped = run(ValidateOptions(("pixel-9",), {"tokens_per_second": 1}), [(coreml, Path())])
    assert metric(verdict, "tokens_per_second").value is None
    assert verdict.passed is False
    assert len(skipped) == 1
    report = Report(targets=(verdict,), skipped=skipped)
    assert report.exit_code == 1
    assert "is not known" in report.failures[0]


def test_what_was_published_of_the_very_model_judges_nothing() -> None:
    """Apple's own model on the phone that Apple measured it on: the rate is an estimate, and no measurement."""
    row = next(r for r in published() if r.model == "afm-2024")
    assert PROFILES[row.device] == "iphone-15-pro"
    layers = {"a": {"bits": 4, "bytes": int(row.streamed_bytes), "parameters": int(row.multiply_accumulates),
                    "format": "palette4"}}  # fmt: skip
    details = {"layers": layers, "context_length": 4096, "vocabulary": 49_152, "attention_width": row.attention_width}
    afm = Artifact("coreml", "export/coreml", int(row.streamed_bytes), "0" * 64, details=details)
    (verdict,), _ = run(ValidateOptions(("iphone-15-pro",), ("tokens_per_second >= 20",)), [(afm, Path())])
    assert metric(verdict, "tokens_per_second").passed
    assert {m.basis for m in verdict.metrics} == {"measured", "estimated"}
    strict = ValidateOptions(("iphone-15-pro",), ("tokens_per_second >= 20",), require="measured")
    (refused,), _ = run(strict, [(afm, Path())])
    assert metric(refused, "tokens_per_second").passed is False
    with pytest.raises(RecipeError, match="can only be 'measured'"):
        ValidateOptions(require="published")  # type: ignore[arg-type]


def test_require_measured_refuses_estimates(artifact: Artifact) -> None:
    options = ValidateOptions(("pixel-9",), {"tokens_per_second": 1}, require="measured")
    (verdict,), _ = run(options, [(artifact, Path())])
    assert metric(verdict, "tokens_per_second").passed is False
    assert metric(verdict, "tokens_per_second").budget == ">= 1 tokens/s, measured"


def test_host_is_run_and_measured(tmp_path: Path, artifact: Artifact) -> None:
    pytest.importorskip("onnxruntime")
    folder = write_decoder(tmp_path / "onnx")
    options = ValidateOptions(
        ("host",), {"tokens_per_second": 1}, "measured", prompt_tokens=8, decode_tokens=4, repeats=1, threads=1
    )
    artifacts = [(artifact, folder), (replace(artifact, format="coreml"), folder)]
    (verdict,), skipped = run(options, artifacts)
    assert verdict.passed is True
    assert {m.basis for m in verdict.metrics} == {"measured"}
    assert "no runtime for coreml" in skipped[0].why


def test_a_budget_on_what_the_host_does_not_measure_fails(tmp_path: Path, artifact: Artifact) -> None:
    pytest.importorskip("onnxruntime")
    options = ValidateOptions(("host",), {"tokens_per_second_sustained": 1}, decode_tokens=2, repeats=1, threads=1)
    (verdict,), _ = run(options, [(artifact, write_decoder(tmp_path / "onnx"))])
    assert metric(verdict, "tokens_per_second_sustained").passed is False


def test_context_longer_than_the_model_is_cut(artifact: Artifact) -> None:
    (long,), _ = run(ValidateOptions(("pixel-9",), context=100_000), [(artifact, Path())])
    (whole,), _ = run(ValidateOptions(("pixel-9",)), [(artifact, Path())])
    assert long == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ()}, "at least one device profile"),
        ({"require": "estimated"}, "can only be 'measured'"),
        ({"memory": "all"}, "one of default"),
        ({"context": 0}, "context=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"budgets": {"speed": 3}}, "speed is no metric"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ValidateOptions(**options)


def test_junit_counts_cases() -> None:
    parity = Parity(0.5, 0.1, 0.9, 64, "onnxruntime 1.0", passed=False)
    metrics = (Metric("tokens_per_second", None, "tokens/s", "estimated", ">= 30", False),
               Metric("package_bytes", 10.0, "bytes", "measured", "<= 20", True),
               Metric("peak_memory_bytes", 10.0, "bytes", "estimated"))  # fmt: skip
    report = Report(
        artifacts=(Artifact("onnx", "a<b>\x01", 1, "0", parity),),
        targets=(TargetVerdict("pixel-9", metrics),),
        skipped=(Skipped("x & y", "why"),),
    )
    suite = ElementTree.fromstring(junit(report))
    assert suite.attrib == {"name": "dwindle", "tests": "4", "failures": "2", "skipped": "1"}
    assert [c.get("classname") for c in suite] == ["parity", "budget.pixel-9", "budget.pixel-9", "skipped"]
    assert "not known" in (suite[1][0].get("message") or "")


def test_a_budget_at_a_prompt_of_its_own(artifact: Artifact) -> None:
    budgets = ("ttft <= 300ms @ 512", "ttft <= 300ms", "ttft <= 1s @ 4096")
    options = ValidateOptions(("pixel-9",), budgets, prompt_tokens=128)
    (verdict,), skipped = run(options, [(artifact, Path())])
    usual, long, beyond = (metric(verdict, f"time_to_first_token_seconds{end}") for end in ("", " @ 512", " @ 4096"))
    assert (long.value or 0) > (usual.value or 0)
    assert (long.budget, long.passed, long.unit) == ("<= 300 ms @ 512", True, "seconds")
    assert (beyond.value, beyond.passed) == (None, False)
    assert [line.why for line in skipped] == ["export/onnx takes 512 tokens"]


def test_a_prompt_of_its_own_is_measured_on_the_host(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Found:
        def __init__(self, place: Path, *, options: Any) -> None:
            asked.append(options.prompt_tokens)
            self.seconds = options.prompt_tokens / 1000

        def metrics(self) -> dict[str, Metric]:
            name = "time_to_first_token_seconds"
            return {name: Metric(name, self.seconds, "seconds", "measured")}

    monkeypatch.setattr(kept, "measure", Found)
    budgets = ("ttft <= 100ms @ 200", "ttft <= 1s @ 400")
    (verdict,), skipped = run(ValidateOptions(("host",), budgets, require="measured"), [(artifact, Path())])
    assert asked == [512, 200]
    assert metric(verdict, "time_to_first_token_seconds @ 200").passed is False
    assert metric(verdict, "time_to_first_token_seconds @ 400").value is None
    assert "half of them as a prompt" in skipped[0].why


def test_quality_is_held_to_the_last_step_of_the_variant(artifact: Artifact) -> None:
    def measured(kl: float, agreement: float) -> Measurement:
        return Measurement(1, 1, 8.0, nats_per_token=1.0, kl_nats_per_token=kl, top1_agreement=agreement)

    teacher = Measurement(1, 1, 32.0)
    adapted = {"task": "sums", "metrics_after": {"exact_match": 0.7}}
    steps = (
        StepRecord("distill", teacher, measured(0.3, 0.8)),
        StepRecord("quantize", teacher, measured(0.1, 0.9), variant="onnx", details=adapted),
        StepRecord("quantize", teacher, measured(0.9, 0.1), variant="apple"),
    )
    budgets = ("kl <= 0.2", "top1_agreement >= 95%", "task.sums.exact_match >= 0.6", "task.sums.rouge_l >= 0.6")
    (verdict,), _ = run(ValidateOptions(("pixel-9",), budgets), [(artifact, Path())], steps=steps)
    kl, agreement = metric(verdict, "kl_nats_per_token"), metric(verdict, "top1_agreement")
    assert (kl.value, kl.basis, kl.passed) == (0.1, "measured", True)
    assert (agreement.value, agreement.passed) == (0.9, False)
    assert metric(verdict, "task.sums.exact_match").passed is True
    assert metric(verdict, "task.sums.rouge_l").value is None
    assert metric(verdict, "task.sums.rouge_l").passed is False
    (plain,), _ = run(ValidateOptions(("pixel-9",)), [(artifact, Path())], steps=steps)
    assert {m.name for m in plain.metrics} == set(METRIC_UNITS)


def test_a_float_artifact_is_not_judged_by_the_codes(artifact: Artifact) -> None:
    def step(name: str, kl: float) -> StepRecord:
        model = Measurement(1, 1, 8.0, kl_nats_per_token=kl)
        return StepRecord(name, model, model)

    options = ValidateOptions(("pixel-9",), {"kl": "<= 0.1"})
    steps = (step("distill", 0.05), step("quantize", 0.3), step("recover", 0.2))
    for variant, passed in (("float", True), (None, False)):
        (verdict,), _ = run(options, [(replace(artifact, variant=variant), Path())], steps=steps)
        assert metric(verdict, "kl_nats_per_token").passed is passed
